"""Names of everything that a checkpoint is made of.

    RUN_DIR/checkpoints/step-00000100/        complete, since it was renamed when all of it was on the disk
        manifest.json                         the list of its files, and all that is not a tensor
        rank-00000.safetensors                the fragments that rank 0 owned
            weight/PARAMETER/START            an fp32 master weight, flat, from element START on
            exp_avg/PARAMETER/START           an Adam moment
            exp_avg_sq/PARAMETER/START
    RUN_DIR/checkpoints/step-00000100.tmp     left by an interrupted save
    RUN_DIR/checkpoints/latest                the name of the newest, for people; nothing reads it

A folder of any other name, such as somebody's copy, is neither read nor removed.
"""

import re
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Literal, get_args

from llama_mcore.errors import MissingInputError, input_problem

MANIFEST = "manifest.json"
TEMPORARY = ".tmp"
REPLACED = ".replaced"
"""Suffix of a checkpoint while another of its step takes its name; it counts until that is done."""
ABANDONED = "abandoned-"
"""Prefix of a checkpoint whose steps were abandoned; nothing reads or removes it."""
LATEST = "latest"
Kind = Literal["weight", "exp_avg", "exp_avg_sq"]
KINDS: tuple[str, ...] = get_args(Kind)
WEIGHT = "weight"
_HEADROOM = 1.1
"""Free space that a save asks for, relative to what it writes."""
_NAME = re.compile(rf"step-(\d{{8}})(?:{re.escape(REPLACED)})?")
_UNFINISHED = re.compile(rf"step-\d{{8}}(?:\.removed)?{re.escape(TEMPORARY)}")


def checkpoints_dir(run_dir: Path) -> Path:
    return run_dir / "checkpoints"


def step_dir(run_dir: Path, step: int) -> Path:
    return checkpoints_dir(run_dir) / f"step-{step:08d}"


def abandoned_dir(folder: Path) -> Path:
    """A free name for the checkpoint `folder` once its steps are abandoned."""
    names = (f"{ABANDONED}{folder.name}" + (f".{n}" if n else "") for n in count())
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
    """Everything with the name of a checkpoint, oldest first, valid or not.

    Raises OSError where the folder of checkpoints exists but cannot be listed: that is not to have none.
    """
    folders = [path for path in _listed(run_dir) if _NAME.fullmatch(path.name)]
    return sorted(folders, key=lambda path: (path.stem, not path.suffix))


def unfinished(run_dir: Path) -> Iterator[Path]:
    """Leftovers of interrupted saves and removals. Raises as `step_folders` does."""
    yield from filter(_is_unfinished, _listed(run_dir))


def lookalikes(run_dir: Path) -> list[str]:
    """Names that begin like a checkpoint's but are somebody's copies. Raises as `step_folders` does."""
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


def room_for(checkpoints: int, num_params: int) -> int:
    """Bytes that must be free on the disk before so many checkpoints are written."""
    return int(_HEADROOM * checkpoints * 4 * len(KINDS) * num_params)


def unreadable(error: OSError) -> MissingInputError:
    """Error for a folder that cannot be listed."""
    return MissingInputError(input_problem("folder", error.filename, error=error))
