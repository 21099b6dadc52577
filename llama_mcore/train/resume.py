"""Where a run begins: at the newest valid checkpoint, at one that was named, or anew. Never silently anew."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist

from llama_mcore.checkpoint.diff import changed_settings
from llama_mcore.checkpoint.lineage import read_lineage, write_lineage
from llama_mcore.checkpoint.loader import check_same_model
from llama_mcore.checkpoint.paths import given_up_dir, not_foreign, step_of
from llama_mcore.checkpoint.reader import CheckpointReader
from llama_mcore.checkpoint.run_lock import FOLDER as LEASE
from llama_mcore.checkpoint.start import Start, Way, none_valid, way_of
from llama_mcore.checkpoint.train_state import TrainState
from llama_mcore.config.schema import RunConfig
from llama_mcore.distributed.groups import Groups
from llama_mcore.errors import CheckpointError, OutputError, Problem
from llama_mcore.observe.goodput.attempts import is_requeued
from llama_mcore.observe.log import get_logger
from llama_mcore.observe.phases import Phases
from llama_mcore.observe.sinks import GIVEN_UP_METRICS, METRICS_FILE, keep_steps_after

T = TypeVar("T")
Together = Callable[[Callable[[], T]], T]
"""Runs an action on every rank and raises on all what failed on any."""


@dataclass(frozen=True)
class ResumePoint:
    way: Way
    reader: CheckpointReader | None
    passed_over: list[str] = field(default_factory=list)
    """Newer checkpoints that are damaged, and how."""

    @property
    def resumes(self) -> bool:
        """The run goes on; else it begins, with the reader's weights where there is one."""
        return bool(self.way.folders)

    @property
    def state(self) -> TrainState:
        """To go on from."""
        if self.resumes and self.reader:
            return self.reader.state
        return TrainState(run_id=self.way.lineage.run_id, began_from=self.way.lineage.began_from)


def find_start(
    run: RunConfig, start: Start, groups: Groups, together: Together, phases: Phases
) -> ResumePoint:
    """The checkpoint to begin from, read and verified; all ranks call it together and get the same. Nothing
    is changed before `settle`.

    Every byte is checked once: each rank hashes its share of the files. Raises what `way_of` does,
    CheckpointError where none of the checkpoints is valid, and ConfigError for one of another model.
    """
    start = broadcast_from_rank0(groups, lambda: still_asked(run, start), together)
    way = broadcast_from_rank0(groups, lambda: way_of(run, start), together)
    for remark in way.remarks():
        get_logger().info("%s", remark)
    damaged: list[Problem] = []
    passed_over: list[str] = []
    for folder in way.newest_first():
        try:
            reader = together(lambda folder=folder: verified(folder, groups, phases))  # type: ignore[misc]
        except CheckpointError as error:
            damaged += error.problems
            passed_over.append(error.message())
            get_logger().warning("%s IS DAMAGED and passed over: %s", folder, error.message())
            continue
        together(lambda reader=reader: check_same_model(reader, run))  # type: ignore[misc]
        found = ResumePoint(way, reader, passed_over)
        if found.resumes:
            for change in changed_settings(reader.manifest.config, run.model_dump(mode="json"), of_both=True):
                get_logger().info("since the checkpoint: %s", change)
        return found
    if damaged:
        raise none_valid(run, start, damaged)
    return ResumePoint(way, None)


def still_asked(run: RunConfig, asked: Start) -> Start:
    """What still counts of what was asked for when a job began that Slurm has put back into the queue."""
    still = replace(asked, resume="auto", init_from="", fresh=False)
    if still == asked or not is_requeued(Path(run.run.dir)):
        return asked
    get_logger().info("put back into the queue: --fresh, --init-from and --resume counted when the job began")
    return still


def verified(folder: Path, groups: Groups, phases: Phases) -> CheckpointReader:
    """The checkpoint, of which this rank has read its share of the files."""
    try:
        reader = CheckpointReader(folder, phases.progress)
        reader.check_content(groups.rank, groups.world_size, phases.progress)
    finally:
        phases.beat()  # where a file is damaged too: ranks that got equally far have equally many
    return reader


def settle(run: RunConfig, found: ResumePoint) -> None:
    """Make the run's folder that of what was found, before its first step. Rank 0 alone, which holds the run.

    Nothing is removed: what does not count any more is moved aside. Raises OSError and OutputError.
    """
    run_dir, way = Path(run.run.dir), found.way
    if way.fresh:
        _move_aside(run_dir)
    if way.goes_back:
        _give_up_after(run_dir, found.state)
    if read_lineage(run_dir) != way.lineage:
        write_lineage(run_dir, way.lineage)


def _move_aside(run_dir: Path) -> None:
    there = [path for path in run_dir.iterdir() if path.name != LEASE]
    if not there:
        return
    aside = run_dir.with_name(f"{run_dir.name}.before-{time.strftime('%Y%m%d-%H%M%S')}")
    aside.mkdir()
    for path in there:
        path.rename(aside / path.name)


def _give_up_after(run_dir: Path, state: TrainState) -> None:
    """Keep what the run did after a checkpoint that it goes back to, where it is not taken up again."""
    if not _later(run_dir, state):
        return
    metrics, kept = run_dir / METRICS_FILE, run_dir / GIVEN_UP_METRICS
    if metrics.exists():
        keep_steps_after(metrics, state.step, kept)
    names = ", ".join(path.name for path in put_aside(run_dir, state))
    get_logger().warning(
        "GONE BACK to step %d; what came after it is kept: checkpoints/%s, lines of steps in %s. "
        "To go on after a stop leave --resume off",
        state.step,
        names,
        kept.name,
    )


def put_aside(run_dir: Path, state: TrainState) -> list[Path]:
    """Rename the run's checkpoints after `state`, so that none of them is taken up again; their new names."""
    try:
        return [path.rename(given_up_dir(path)) for path in _later(run_dir, state)]
    except OSError as error:
        reason = f"cannot be put aside ({error.strerror})"
        raise OutputError(Problem("checkpoint", error.filename, reason)) from error


def _later(run_dir: Path, state: TrainState) -> list[Path]:
    return [path for path in not_foreign(run_dir, state.run_id) if step_of(path) > state.step]


def broadcast_from_rank0(groups: Groups, look: Callable[[], T], together: Together) -> T:
    """What rank 0 sees: on a network file system others may see a folder sooner or later."""
    seen = together(lambda: look() if groups.rank == 0 else None)
    box = [seen]
    dist.broadcast_object_list(box, src=0)
    return box[0]
