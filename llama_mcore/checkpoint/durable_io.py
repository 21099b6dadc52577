"""Durable file operations: every change that a save makes on the disk.

The content of a file is on the disk after an fsync of the file, its name after an fsync of its folder. Saves
use these functions alone, so that tests can count, record and fail each operation (`observer`).
"""

import hashlib
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

Buffer = bytes | memoryview

observer: Callable[[str, Path], None] = lambda operation, path: None  # noqa: E731
"""Called with each operation and its path before it happens."""


def write_file(path: Path, chunks: Iterable[Buffer], held: int | None = None) -> tuple[int, str]:
    """Write a new file, wait until its content is on the disk, and return its size and SHA-256.

    `chunks`: bytes, so that their length is their size. `held`: how many of them stay as they are while the
    next is made; None: all. Raises OSError, including FileExistsError: the file of a writer that is thought
    dead must not mix with that of its successor.
    """
    # The bytes in memory are hashed while they are written: a core hashes about as fast as a good disk
    # writes.
    size, sha256, hashing = 0, hashlib.sha256(), deque[Future[None]]()
    observer("create", path)
    with path.open("xb", buffering=0) as file, ThreadPoolExecutor(1) as hasher:
        for chunk in chunks:
            hashing.append(hasher.submit(sha256.update, chunk))
            observer("write", path)
            _write_all(file.fileno(), chunk)
            size += len(chunk)
            while held is not None and len(hashing) > held:
                hashing.popleft().result()
        observer("fsync", path)
        os.fsync(file.fileno())
        for chunk_hashed in hashing:
            chunk_hashed.result()
    return size, sha256.hexdigest()


def _write_all(descriptor: int, chunk: Buffer) -> None:
    view = memoryview(chunk)
    while view:
        view = view[os.write(descriptor, view) :]


def make_folder(path: Path) -> None:
    observer("mkdir", path)
    path.mkdir(parents=True)


def rename(path: Path, to: Path) -> None:
    observer("rename", to)
    path.rename(to)


def sync_folder(path: Path) -> None:
    """Wait until the names of the files in a folder are on the disk."""
    observer("fsync", path)
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_names(path: Path) -> None:
    """Wait until the names of a folder and of those above it, which may be new, are on the disk."""
    for folder in path.resolve().parents:
        with suppress(PermissionError):  # whoever may not read it has not created anything in it
            sync_folder(folder)
        if folder.is_mount():
            return


def remove_folder(path: Path) -> None:
    """Remove a folder with a temporary name; what cannot be removed now stays for the next time."""
    observer("remove", path)
    shutil.rmtree(path, ignore_errors=True)


def replace_hint(path: Path, text: str) -> None:
    """Replace a small text file; under its name there is either the old text or the new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.unlink(missing_ok=True)
    write_file(temporary, [text.encode()])
    rename(temporary, path)
