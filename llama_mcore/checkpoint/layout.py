"""What a checkpoint looks like on disk.

    RUN_DIR/checkpoints/step-00000100/
        manifest.json             the run and its files; its presence means complete
        rank-00000.safetensors    the fragments that rank 0 owned

A fragment is a stretch of one parameter of one tensor-parallel rank, as ZeRO cut it: its fp32 master weight
or one of its Adam moments, stored flat under the key `kind/parameter/start`.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llama_mcore.errors import CheckpointError, MissingInputError, Problem

FORMAT = "llama_mcore/1"
MANIFEST = "manifest.json"
TEMPORARY = ".tmp"
WEIGHT = "weight"
KINDS = (WEIGHT, "exp_avg", "exp_avg_sq")


def checkpoints_dir(run_dir: Path) -> Path:
    return run_dir / "checkpoints"


def step_dir(run_dir: Path, step: int) -> Path:
    return checkpoints_dir(run_dir) / f"step-{step:08d}"


def rank_file(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def fragment_key(kind: str, name: str, start: int) -> str:
    return f"{kind}/{name}/{start}"


def parse_fragment_key(key: str) -> tuple[str, str, int]:
    """(kind, parameter, start) of a key that `fragment_key` made."""
    kind, name, start = key.split("/")
    return kind, name, int(start)


def complete_checkpoints(run_dir: Path) -> list[Path]:
    """Folders of the complete checkpoints of a run, oldest first.

    A manifest in a temporary folder does not count: its files may be on their way in, or out.
    """
    found = (path.parent for path in checkpoints_dir(run_dir).glob(f"step-*/{MANIFEST}"))
    return sorted(path for path in found if path.suffix != TEMPORARY)


def find_checkpoint(path: Path) -> Path:
    """A checkpoint folder as it is; the newest checkpoint of a run folder."""
    if (path / MANIFEST).is_file():
        return path
    found = complete_checkpoints(path)
    if not found:
        raise MissingInputError(
            Problem(
                "checkpoint", path, "holds no complete checkpoint", "give a run folder or a step-* folder"
            )
        )
    return found[-1]


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of the checkpoint in `path`. Raises CheckpointError if it is not one of this format."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(Problem("manifest", path / MANIFEST, f"cannot be read ({error})")) from None
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found != FORMAT:
        raise CheckpointError(Problem("format", found, f"of {path} is not {FORMAT}"))
    return manifest


def write_durably(path: Path, text: str) -> None:
    """Write a small file and wait until it is on disk."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def sync_dir(path: Path) -> None:
    """Wait until the names in a folder are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def unfinished(run_dir: Path) -> Iterator[Path]:
    """What interrupted saves and removals left behind."""
    yield from checkpoints_dir(run_dir).glob(f"*{TEMPORARY}")
