"""Folder of a run: whose it is, which of its checkpoints are the run's, and what else may be in it.

    RUN_DIR/run.json         the run's id and origin; written before the first step
    RUN_DIR/config.yaml      its configuration
    RUN_DIR/checkpoints/     paths.py
    RUN_DIR/lease/           run_lock.py
    RUN_DIR/metrics.jsonl, timeline.jsonl, attempts.jsonl, tensorboard/, deepspeed/, profile/, stalls/

The run id in run.json says which checkpoints are the run's: others are neither read nor removed. Loads no
torch.
"""

import hashlib
import json
import os
from dataclasses import dataclass, field
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from pathlib import Path
from uuid import uuid4

from llama_mcore.checkpoint.durable_io import replace_hint, sync_folder
from llama_mcore.checkpoint.manifest import (
    LARGEST_MANIFEST,
    manifest_or_none,
    problems_of,
    read_manifest,
    run_id_of,
)
from llama_mcore.checkpoint.paths import MANIFEST, checkpoints_dir, step_folders, unreadable
from llama_mcore.checkpoint.run_lock import FOLDER as LEASE
from llama_mcore.checkpoint.train_state import Origin
from llama_mcore.config.load import LARGEST_CONFIG
from llama_mcore.config.schema import RunConfig
from llama_mcore.config.section import Section
from llama_mcore.errors import CheckpointError, ConfigError, MissingInputError, Problem, input_problem, shown
from llama_mcore.observe.goodput.attempts import ATTEMPTS_FILE
from llama_mcore.observe.goodput.timeline import TIMELINE_FILE
from llama_mcore.observe.metrics_file import ABANDONED_METRICS, METRICS_FILE
from llama_mcore.small_file import parse_yaml, read_json, read_small_file

RUN_FILE = "run.json"
CONFIG_FILE = "config.yaml"
PREFLIGHT_MARK = ".preflight"
"""Prefix of the files that a preflight writes to try the folder."""
KNOWN = {CONFIG_FILE, RUN_FILE, METRICS_FILE, ABANDONED_METRICS, TIMELINE_FILE, ATTEMPTS_FILE, LEASE} | {
    "tensorboard",
    "checkpoints",
    "deepspeed",
    "profile",
    "stalls",
}
LEFTOVERS = (f"{PREFLIGHT_MARK}*", f"{METRICS_FILE}.tmp", f".{CONFIG_FILE}.tmp", f".{RUN_FILE}.tmp")
"""Files of a preflight or a run that was killed while it wrote; the next one writes them again."""


class Lineage(Section):
    """Content of run.json."""

    run_id: str
    """Drawn when the run began."""
    began: str
    """When that was, or when checkpoints without this file were taken for a run; ISO 8601, UTC."""
    began_from: Origin | None = None
    """None: initial weights were drawn at random."""
    adopted: bool = False
    """Checkpoints without this file were taken for a run, whose earlier steps may be recorded elsewhere."""


def new_lineage(
    run_id: str | None = None, began_from: Origin | None = None, *, adopted: bool = False
) -> Lineage:
    """Lineage of a run that begins now; its id is drawn where none is given."""
    began = datetime.now(UTC).isoformat(timespec="seconds")
    run_id = uuid4().hex if run_id is None else run_id
    return Lineage(run_id=run_id, began=began, began_from=began_from, adopted=adopted)


def read_lineage(run_dir: Path) -> Lineage | None:
    """Content of run.json; None where there is none. Raises CheckpointError if it cannot be read."""
    path = run_dir / RUN_FILE
    try:
        return Lineage.model_validate(read_json(path, LARGEST_MANIFEST))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or shown(" ".join(str(error).split()))
        remedy = (
            "restore it, or remove it: the run is then identified by its checkpoints; without any it starts "
            "from scratch, and needs --init-from again if it began that way"
        )
        raise CheckpointError(Problem(RUN_FILE, path, f"cannot be read ({reason})", remedy)) from None


def write_lineage(run_dir: Path, lineage: Lineage) -> None:
    """Replace run.json in one move, on the disk before this returns. Raises OSError."""
    replace_hint(run_dir / RUN_FILE, json.dumps(lineage.model_dump(), indent=2) + "\n")
    sync_folder(run_dir)


def origin_of(folder: Path) -> Origin:
    """The checkpoint in `folder` as the origin of a run. Raises CheckpointError where its manifest cannot be
    read."""
    manifest = read_manifest(folder)
    content = read_small_file(folder / MANIFEST, LARGEST_MANIFEST)
    return Origin(
        path=os.fsencode(folder.resolve()).decode(errors="backslashreplace"),
        run_id=manifest.run_id,
        step=manifest.step,
        manifest_sha256=hashlib.sha256(content).hexdigest(),
    )


@dataclass(frozen=True)
class Held:
    """Folders with the names of checkpoints in a run's folder, by owner."""

    lineage: Lineage | None
    """Content of run.json; without one, the run that wrote all these checkpoints. None: no run."""
    adopted: bool
    """The lineage was taken from the checkpoints."""
    own: list[Path] = field(default_factory=list)
    """The run's, oldest first. What cannot be read is among them: it is nobody else's."""
    foreign: dict[Path, str] = field(default_factory=dict)
    """Checkpoints of other runs, and the ids of these."""


def held_in(run_dir: Path) -> Held:
    """Checkpoints in a run's folder, by owner.

    Raises CheckpointError for a run.json that cannot be read, ConfigError where there is none and the
    checkpoints are of several runs, OSError as `step_folders` does.
    """
    manifests = {folder: manifest_or_none(folder) for folder in step_folders(run_dir)}
    written = {folder: manifest for folder, manifest in manifests.items() if manifest}
    lineage = read_lineage(run_dir)
    adopted = lineage is None and bool(written)
    if adopted:
        newest = list(written.values())[-1]
        ids = {folder: manifest.run_id for folder, manifest in written.items()}
        if len(set(ids.values())) > 1:
            raise _of_several_runs(run_dir, ids)
        lineage = new_lineage(newest.run_id, newest.began_from, adopted=True)
    foreign = {
        folder: manifest.run_id
        for folder, manifest in written.items()
        if lineage and manifest.run_id != lineage.run_id
    }
    return Held(lineage, adopted, [folder for folder in manifests if folder not in foreign], foreign)


def _of_several_runs(run_dir: Path, ids: dict[Path, str]) -> ConfigError:
    remedy = f"leave those of one run in {checkpoints_dir(run_dir)} and move the others out"
    return ConfigError(
        [
            Problem("checkpoint", folder, f"belongs to run {shown(run_id)}, others to another", remedy)
            for folder, run_id in ids.items()
        ]
    )


def not_foreign(run_dir: Path, run_id: str) -> list[Path]:
    """Checkpoints of a run that is in progress and unreadable ones, oldest first. Raises as `step_folders`
    does."""
    return [folder for folder in step_folders(run_dir) if run_id_of(folder) in (None, run_id)]


def complete_checkpoints(run_dir: Path) -> list[Path]:
    """The run's checkpoints with a valid manifest and all files, oldest first. Raises as `held_in` does."""
    return [folder for folder in held_in(run_dir).own if not problems_of(folder)]


def find_checkpoint(path: Path) -> Path:
    """A checkpoint's folder as it is; of a run's folder the newest complete checkpoint of that run."""
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


def foreign(run_dir: Path) -> list[str]:
    """Names in the folder that no run gives. Raises OSError where it cannot be listed."""
    names = sorted(path.name for path in run_dir.iterdir())
    leftover = {name for name in names if any(fnmatchcase(name, pattern) for pattern in LEFTOVERS)}
    return [name for name in names if name not in KNOWN | leftover]


def state_of(run_dir: Path) -> str:
    """State of the folder in a few words, by names alone."""
    try:
        if not run_dir.exists():
            return "new"
        if folders := step_folders(run_dir):
            return f"holds a checkpoint: {folders[-1].name}"
        if foreign(run_dir):
            return "is not a run's folder"
        known = KNOWN.intersection(path.name for path in run_dir.iterdir())
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return "holds a run without a checkpoint" if known else "empty"


def is_same_run(run_dir: Path, run: RunConfig) -> bool:
    """True if everything in the folder comes from starts with the same configuration."""
    if foreign(run_dir):
        return False
    try:
        text = read_small_file(run_dir / CONFIG_FILE, LARGEST_CONFIG).decode()
        there = parse_yaml(text)
    except (OSError, ValueError):
        return True  # it ended before it wrote one
    # Older versions wrote it in place: one that was killed left an empty file, or half a line at its end.
    return not text.endswith("\n") or bool(there == run.model_dump())


def would_start_from_scratch(run_dir: Path) -> ConfigError:
    """Error for a folder that is another run's, or nobody's."""
    remedy = "choose another folder, or give --fresh to move its content aside"
    return ConfigError(
        Problem("run.dir", run_dir, "is not empty, and the run would start from scratch there", remedy)
    )
