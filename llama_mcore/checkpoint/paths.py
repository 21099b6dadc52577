"""Layout of checkpoints on disk, and which of a folder are the run's.

    RUN_DIR/run.json              which run it is (lineage.py)
    RUN_DIR/checkpoints/step-00000100/
        manifest.json             the run, and the list of its files with their hashes
        rank-00000.safetensors    the fragments that rank 0 owned
    RUN_DIR/checkpoints/latest    the name of the newest, for people; nothing reads it

A fragment is a stretch of one parameter of one tensor-parallel rank, as ZeRO cut it: its fp32 master weight
or one of its Adam moments, stored flat under the key `kind/parameter/start`.

A folder under its final name is complete: it is written under a temporary name and renamed when all of it is
on the disk. What has any other name, such as a copy that somebody made, is neither read nor removed,
and neither is what another run has written.
docs/checkpoint.md has the whole story.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import get_args

from llama_mcore.checkpoint.lineage import Lineage, new_lineage, read_lineage
from llama_mcore.checkpoint.manifest import MANIFEST, Kind, Manifest, missing_files, read_manifest
from llama_mcore.errors import CheckpointError, ConfigError, MissingInputError, Problem, input_problem, shown

TEMPORARY = ".tmp"
REPLACED = ".replaced"
"""What a checkpoint is called while another of its step takes its name; it counts until that is done."""
GIVEN_UP = "given-up-"
"""Begins the name of a checkpoint whose steps were given up; nothing reads or removes it."""
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


@dataclass(frozen=True)
class Held:
    """Folders with the names of checkpoints in a run's folder, by whose they are."""

    lineage: Lineage | None
    """Content of run.json; without one, the run that all these checkpoints are of. None: no run."""
    adopted: bool
    """It was taken from the checkpoints."""
    own: list[Path] = field(default_factory=list)
    """Oldest first. What cannot be read is among them: it is nobody else's."""
    foreign: dict[Path, str] = field(default_factory=dict)
    """Checkpoints of other runs, and the ids of these."""


def held_in(run_dir: Path) -> Held:
    """Whose the checkpoints in a run's folder are.

    Raises CheckpointError for a run.json that cannot be read, ConfigError where there is none and the
    checkpoints are of several runs, OSError as `step_folders` does.
    """
    manifests = {folder: _manifest_of(folder) for folder in step_folders(run_dir)}
    written = {folder: manifest for folder, manifest in manifests.items() if manifest}
    lineage = read_lineage(run_dir)
    adopted = lineage is None and bool(written)
    if adopted:
        newest = list(written.values())[-1]
        if any(manifest.run_id != newest.run_id for manifest in written.values()):
            raise _of_several_runs(run_dir, written)
        lineage = new_lineage(newest.run_id, newest.began_from, adopted=True)
    foreign = {
        folder: manifest.run_id
        for folder, manifest in written.items()
        if lineage and manifest.run_id != lineage.run_id
    }
    return Held(lineage, adopted, [folder for folder in manifests if folder not in foreign], foreign)


def run_id_of(folder: Path) -> str | None:
    """Id of the run that wrote a checkpoint; None where its manifest cannot be read."""
    manifest = _manifest_of(folder)
    return manifest.run_id if manifest else None


def not_foreign(run_dir: Path, run_id: str) -> list[Path]:
    """The checkpoints of a run that is at work, oldest first, and what cannot be read. Raises as
    `step_folders` does."""
    return [folder for folder in step_folders(run_dir) if run_id_of(folder) in (None, run_id)]


def _manifest_of(folder: Path) -> Manifest | None:
    try:
        return read_manifest(folder)
    except CheckpointError:
        return None


def _of_several_runs(run_dir: Path, written: dict[Path, Manifest]) -> ConfigError:
    remedy = f"leave those of one run in {checkpoints_dir(run_dir)} and move the others out"
    return ConfigError(
        [
            Problem(
                "checkpoint", folder, f"is of run {shown(manifest.run_id)}, others are of another", remedy
            )
            for folder, manifest in written.items()
        ]
    )


def complete_checkpoints(run_dir: Path) -> list[Path]:
    """The run's checkpoints whose manifest is valid and whose files are all there, oldest first. Raises what
    `held_in` does."""
    return [folder for folder in held_in(run_dir).own if not problems_of(folder)]


def find_checkpoint(path: Path) -> Path:
    """A checkpoint folder as it is; of a run's folder the newest complete one that is the run's."""
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
