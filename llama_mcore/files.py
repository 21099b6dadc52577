"""Output files that appear under their final name complete, or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llama_mcore.errors import OutputError, Problem


def temporary_name(path: Path) -> Path:
    """Name of `path` until it is complete: hidden, and in the same folder, so that it can be renamed."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


@contextmanager
def output_errors(path: Path, field: str = "output") -> Iterator[None]:
    """Turn an OSError while writing `path` into an OutputError that names `field`."""
    try:
        yield
    except OSError as error:
        raise OutputError(
            Problem(
                field, path, f"cannot be written ({error.strerror})", "choose another place, or free space"
            )
        ) from error


def prepare_output(path: Path, field: str = "output") -> None:
    """Make the folder of `path`, and check before any work that the file can be written."""
    probe = temporary_name(path)
    with output_errors(path, field):
        if path.is_dir():
            raise OutputError(Problem(field, path, "is a folder", "give the name of a file"))
        if path.parent.is_file():
            reason = f"{path.parent} is a file, not a folder"
            raise OutputError(Problem(field, path, reason, "choose another place"))
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            probe.touch()
        finally:
            probe.unlink(missing_ok=True)


def replace_durably(temporary: Path, path: Path) -> None:
    """Rename `temporary` to `path`; even after a power cut `path` never has half of the bytes."""
    with temporary.open("rb") as stream:
        os.fsync(stream.fileno())
    os.replace(temporary, path)


@contextmanager
def published(path: Path) -> Iterator[Path]:
    """Yield a temporary name, which becomes `path` if the block succeeds and is deleted if it fails."""
    prepare_output(path)
    temporary = temporary_name(path)
    try:
        yield temporary
        with output_errors(path):
            replace_durably(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
