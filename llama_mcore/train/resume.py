"""Where a run begins: at the newest sound checkpoint, at one that was named, or anew. Never silently anew."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist

from llama_mcore.checkpoint.compare import changed_settings
from llama_mcore.checkpoint.layout import find_checkpoint, step_folders, unreadable
from llama_mcore.checkpoint.lease import FOLDER as LEASE
from llama_mcore.checkpoint.load import check_same_model
from llama_mcore.checkpoint.reader import CheckpointReader
from llama_mcore.checkpoint.run_folder import is_same_run, would_begin_anew
from llama_mcore.config import RunConfig
from llama_mcore.errors import CheckpointError, MissingInputError, Problem, input_problem
from llama_mcore.observe.lives import LIVES_FILE, is_requeued
from llama_mcore.observe.log import get_logger
from llama_mcore.observe.phases import Phases
from llama_mcore.parallel.groups import Groups

T = TypeVar("T")
Together = Callable[[Callable[[], T]], T]
"""Runs an action on every rank and raises on all what failed on any."""


@dataclass(frozen=True)
class Start:
    """What the user asked for: in a job of Slurm, of its first start."""

    resume: str = "auto"
    """auto: from the newest sound checkpoint of the run's folder, if it has any; never; or the folder of a
    checkpoint or of a run."""
    fresh: bool = False
    """Move what the run's folder holds aside and begin anew."""
    accept_data_change: bool = False
    """Resume with other data than before, and record that."""


@dataclass(frozen=True)
class Found:
    reader: CheckpointReader | None
    passed_over: list[str] = field(default_factory=list)
    """Newer checkpoints that are damaged, and how."""


def find_start(run: RunConfig, start: Start, groups: Groups, together: Together, phases: Phases) -> Found:
    """The checkpoint to begin from, read and verified; all ranks call it together and get the same.

    Every byte is checked once: each rank hashes its share of the files. Raises MissingInputError where a
    named checkpoint is not there, CheckpointError where none of those that are is sound, ConfigError for a
    checkpoint of another model and for a folder that would be overwritten.
    """
    start = same_on_all_ranks(groups, lambda: _still_asked(run, start), together)
    folders = same_on_all_ranks(groups, lambda: _candidates(run, start), together)
    passed_over: list[str] = []
    for folder in reversed(folders):
        try:
            reader = together(lambda folder=folder: verified(folder, groups, phases))  # type: ignore[misc]
        except CheckpointError as error:
            passed_over.append(error.message())
            get_logger().warning("%s IS DAMAGED and passed over: %s", folder, error.message())
            continue
        together(lambda reader=reader: check_same_model(reader, run))  # type: ignore[misc]
        for change in changed_settings(reader.manifest.config, run.model_dump(mode="json")):
            get_logger().info("since the checkpoint: %s", change)
        return Found(reader, passed_over)
    if passed_over:
        problems = [Problem("checkpoint", run.run.dir, reason) for reason in passed_over]
        remedy = "restore one, or begin anew with --fresh"
        raise CheckpointError([*problems, Problem("--resume", start.resume, "found no sound one", remedy)])
    together(lambda: _begin_anew(run, start) if groups.rank == 0 else None)
    return Found(None)


def _still_asked(run: RunConfig, asked: Start) -> Start:
    """What still counts of what was asked for when a job began that Slurm has put back into the queue."""
    if not is_requeued(Path(run.run.dir)) or (asked.resume == "auto" and not asked.fresh):
        return asked
    get_logger().info("put back into the queue: --fresh and --resume counted when the job began")
    return replace(asked, resume="auto", fresh=False)


def _candidates(run: RunConfig, start: Start) -> list[Path]:
    """Folders of checkpoints to begin from, oldest first."""
    if start.fresh or start.resume == "never":
        return []
    named = Path(run.run.dir if start.resume == "auto" else start.resume)
    try:
        if start.resume == "auto":
            return step_folders(named)
        if named.is_dir():
            return step_folders(named) or [find_checkpoint(named)]
    except OSError as error:
        raise unreadable(error) from None
    remedy = "name a run's folder or a checkpoint, or auto or never"
    raise MissingInputError(input_problem("--resume", named, remedy))


def verified(folder: Path, groups: Groups, phases: Phases) -> CheckpointReader:
    """The checkpoint, of which this rank has read its share of the files."""
    try:
        reader = CheckpointReader(folder, phases.working)
        reader.check_content(groups.rank, groups.world_size, phases.working)
    finally:
        phases.beat()  # where a file is damaged too: ranks that got equally far have equally many
    return reader


def _begin_anew(run: RunConfig, start: Start) -> None:
    """Refuse to overwrite another run; a run that died before its first checkpoint may begin again."""
    run_dir = Path(run.run.dir)
    there = [path for path in run_dir.iterdir() if path.name != LEASE] if run_dir.is_dir() else []
    if not there:
        return
    if start.fresh:
        aside = run_dir.with_name(f"{run_dir.name}.before-{time.strftime('%Y%m%d-%H%M%S')}")
        aside.mkdir()
        for path in there:
            path.rename(aside / path.name)
        return
    if [path.name for path in there] == [LIVES_FILE]:
        return
    if start.resume == "auto" and not step_folders(run_dir) and is_same_run(run_dir, run):
        return
    raise would_begin_anew(run_dir)


def same_on_all_ranks(groups: Groups, look: Callable[[], T], together: Together) -> T:
    """What rank 0 sees: on a network file system others may see a folder sooner or later."""
    seen = together(lambda: look() if groups.rank == 0 else None)
    box = [seen]
    dist.broadcast_object_list(box, src=0)
    return box[0]
