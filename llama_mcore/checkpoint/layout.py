"""What a checkpoint looks like on disk.

    RUN_DIR/checkpoints/step-00000100/
        manifest.json             the run, and the list of its files with their hashes
        rank-00000.safetensors    the fragments that rank 0 owned
    RUN_DIR/checkpoints/latest    the name of the newest, for people; nothing reads it

A fragment is a stretch of one parameter of one tensor-parallel rank, as ZeRO cut it: its fp32 master weight
or one of its Adam moments, stored flat under the key `kind/parameter/start`.

A folder under its final name is complete: it is written under a temporary name and renamed when all of it is
on the disk. What has any other name, such as a copy that somebody made, is neither read nor removed.
docs/checkpoint.md has the whole story.
"""

import re
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import get_args

from llama_mcore.checkpoint.manifest import MANIFEST, Kind, missing_files, read_manifest
from llama_mcore.errors import CheckpointError, MissingInputError, Problem, input_problem

TEMPORARY = ".tmp"
REPLACED = ".replaced"
"""What a checkpoint is called while another of its step takes its name; it counts until that is done."""
GIVEN_UP = "given-up-"
"""Begins the name of a checkpoint whose steps a rollback gave up; nothing reads or removes it."""
LATEST = "latest"
WEIGHT = "weight"
KINDS: tuple[str, ...] = get_args(Kind)
_SPARE = 1.1
"""Room on the disk that a save asks for, relative to what it writes."""


_NAME = re.compile(rf"step-(\d{{8}})(?:{re.escape(REPLACED)})?")
_UNFINISHED = re.compile(rf"step-\d{{8}}(?:\.removed)?{re.escape(TEMPORARY)}")


def checkpoints_dir(run_dir: Path) -> Path:
    return run_dir / "checkpoints"


def step_dir(run_dir: Path, step: int) -> Path:
    return checkpoints_dir(run_dir) / f"step-{step:08d}"


def room_for(checkpoints: int, num_params: int) -> int:
    """Bytes that must be free on the disk before so many are written."""
    return int(_SPARE * checkpoints * 4 * len(KINDS) * num_params)


def given_up_dir(folder: Path) -> Path:
    """Where the checkpoint `folder` is put aside; a free name."""
    names = (f"{GIVEN_UP}{folder.name}" + (f".{n}" if n else "") for n in count())
    return next(path for name in names if not (path := folder.with_name(name)).exists())


def rank_file(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def fragment_key(kind: str, name: str, start: int) -> str:
    return f"{kind}/{name}/{start}"


def parse_fragment_key(key: str) -> tuple[str, str, int]:
    """(kind, parameter, start) of a key that `fragment_key` made."""
    kind, name, start = key.split("/")
    return kind, name, int(start)


def step_folders(run_dir: Path) -> list[Path]:
    """All that carries the name of a checkpoint, oldest first, whatever it is.

    Raises OSError where the folder of checkpoints is there but cannot be listed: that is not to have none.
    """
    folders = [path for path in _listed(run_dir) if _NAME.fullmatch(path.name)]
    return sorted(folders, key=lambda path: (path.stem, not path.suffix))


def lookalikes(run_dir: Path) -> list[str]:
    """Names that begin like a checkpoint's and are none: copies of people. Raises as `step_folders` does."""
    return sorted(
        path.name
        for path in _listed(run_dir)
        if path.name.startswith("step-") and not (_NAME.fullmatch(path.name) or _is_unfinished(path))
    )


def step_of(folder: Path) -> int:
    """Step in the name of a checkpoint. Raises ValueError for any other name."""
    if named := _NAME.fullmatch(folder.name):
        return int(named[1])
    raise ValueError(f"{folder.name} is not the name of a checkpoint")


def _listed(run_dir: Path) -> list[Path]:
    try:
        return list(checkpoints_dir(run_dir).iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def _is_unfinished(path: Path) -> bool:
    return _UNFINISHED.fullmatch(path.name) is not None


def problems_of(folder: Path) -> list[Problem]:
    """Why a folder is no checkpoint, as far as its manifest and the sizes of its files show."""
    try:
        return missing_files(folder, read_manifest(folder))
    except CheckpointError as error:
        return error.problems


def complete_checkpoints(run_dir: Path) -> list[Path]:
    """Checkpoints of a run whose manifest is sound and whose files are all there, oldest first."""
    return [folder for folder in step_folders(run_dir) if not problems_of(folder)]


def find_checkpoint(path: Path) -> Path:
    """A checkpoint folder as it is; the newest complete checkpoint of a run folder."""
    remedy = "give a run folder or a step-* folder"
    try:
        if (path / MANIFEST).is_file():
            return path
        if not path.exists():
            raise MissingInputError(input_problem("folder", path, remedy))
        found = complete_checkpoints(path)
    except OSError as error:
        raise unreadable(error) from None
    if not found:
        raise MissingInputError(Problem("checkpoint", path, "holds no complete checkpoint", remedy))
    return found[-1]


def unreadable(error: OSError) -> MissingInputError:
    """For a folder that cannot be looked into."""
    return MissingInputError(input_problem("folder", error.filename, error=error))


def unfinished(run_dir: Path) -> Iterator[Path]:
    """What interrupted saves and removals left behind."""
    yield from filter(_is_unfinished, _listed(run_dir))
