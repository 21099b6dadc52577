"""The point where a run continues or begins: newest valid checkpoint, one that was named, or scratch.

A run never starts from scratch in silence.
"""

import time
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from llama_mcore.checkpoint.diff import changed_settings
from llama_mcore.checkpoint.loader import check_same_model
from llama_mcore.checkpoint.paths import abandoned_dir, step_of
from llama_mcore.checkpoint.reader import CheckpointReader
from llama_mcore.checkpoint.run_dir import not_foreign, read_lineage, write_lineage
from llama_mcore.checkpoint.run_lock import FOLDER as LEASE
from llama_mcore.checkpoint.start import Start, StartPlan, none_valid, plan_start
from llama_mcore.checkpoint.train_state import TrainState
from llama_mcore.config.schema import RunConfig
from llama_mcore.distributed.collectives import broadcast_from_rank0, run_on_all_ranks
from llama_mcore.distributed.groups import Groups
from llama_mcore.errors import CheckpointError, OutputError, Problem
from llama_mcore.observe.goodput.attempts import is_requeued
from llama_mcore.observe.log import get_logger
from llama_mcore.observe.phases import Phases
from llama_mcore.observe.sinks import ABANDONED_METRICS, METRICS_FILE, keep_steps_after


@dataclass(frozen=True)
class ResumePoint:
    """Checkpoint that a start continues from or begins with, if any."""

    plan: StartPlan
    reader: CheckpointReader | None
    damaged: list[str] = field(default_factory=list)
    """Newer checkpoints, which are damaged, and how."""

    @property
    def resumes(self) -> bool:
        """True if the run continues; else it begins, with the reader's weights where there is one."""
        return bool(self.plan.folders)

    @property
    def state(self) -> TrainState:
        """State to continue from."""
        if self.resumes and self.reader:
            return self.reader.state
        return TrainState(run_id=self.plan.lineage.run_id, began_from=self.plan.lineage.began_from)


def find_start(run: RunConfig, start: Start, groups: Groups, phases: Phases) -> ResumePoint:
    """Checkpoint to begin from, verified, the same on all ranks; nothing changes before `prepare_run_dir`.

    Every byte is checked once: each rank hashes its share of the files. Raises what `plan_start` does,
    CheckpointError where none of the checkpoints is valid, and ConfigError for one of another model.
    Collective: all ranks call it.
    """
    start = broadcast_from_rank0(groups, lambda: after_requeue(Path(run.run.dir), start))
    plan = broadcast_from_rank0(groups, lambda: plan_start(run, start))
    for remark in plan.remarks():
        get_logger().info("%s", remark)
    problems: list[Problem] = []
    damaged: list[str] = []
    for folder in plan.newest_first():
        try:
            reader = run_on_all_ranks(groups, partial(open_verified, folder, groups, phases))
        except CheckpointError as error:
            problems += error.problems
            damaged.append(error.message())
            get_logger().warning("%s IS DAMAGED and skipped: %s", folder, error.message())
            continue
        run_on_all_ranks(groups, partial(check_same_model, reader, run.model))
        found = ResumePoint(plan, reader, damaged)
        if found.resumes:
            for change in changed_settings(reader.manifest.config, run.model_dump(mode="json"), of_both=True):
                get_logger().info("since the checkpoint: %s", change)
        return found
    if problems:
        raise none_valid(start, problems)
    return ResumePoint(plan, None)


def after_requeue(run_dir: Path, start: Start) -> Start:
    """Options that still count in a job that Slurm has requeued: those of a first start counted then."""
    remaining = replace(start, resume="auto", init_from="", fresh=False)
    if remaining == start or not is_requeued(run_dir):
        return start
    get_logger().info("Slurm requeued this job: --fresh, --init-from and --resume counted at its first start")
    return remaining


def open_verified(folder: Path, groups: Groups, phases: Phases) -> CheckpointReader:
    """Reader of a checkpoint, of which this rank has verified its share of the files."""
    try:
        reader = CheckpointReader(folder, phases.progress)
        reader.check_content(groups.rank, groups.world_size, phases.progress)
    finally:
        # Also where a file is damaged: ranks that got equally far must have beaten equally often.
        phases.beat()
    return reader


def prepare_run_dir(run_dir: Path, found: ResumePoint) -> None:
    """Make the run's folder that of `found`, before the first step; on rank 0 alone, which holds the run.

    Nothing is removed: what does not count any more is moved aside. Raises OSError and OutputError.
    """
    if found.plan.fresh:
        _move_aside(run_dir)
    if found.plan.goes_back:
        _abandon_after(run_dir, found.state)
    if read_lineage(run_dir) != found.plan.lineage:
        write_lineage(run_dir, found.plan.lineage)


def _move_aside(run_dir: Path) -> None:
    present = [path for path in run_dir.iterdir() if path.name != LEASE]
    if not present:
        return
    aside = run_dir.with_name(f"{run_dir.name}.before-{time.strftime('%Y%m%d-%H%M%S')}")
    aside.mkdir()
    for path in present:
        path.rename(aside / path.name)


def _abandon_after(run_dir: Path, state: TrainState) -> None:
    """Keep what the run did after the checkpoint that it returns to, under names that no start reads."""
    if not _later(run_dir, state):
        return
    metrics, kept = run_dir / METRICS_FILE, run_dir / ABANDONED_METRICS
    if metrics.exists():
        keep_steps_after(metrics, state.step, kept)
    names = ", ".join(path.name for path in archive_checkpoints_after(run_dir, state))
    get_logger().warning(
        "RETURNED to step %d; later checkpoints are kept as %s in checkpoints, later metrics in %s. "
        "Leave --resume off when you continue this run after a stop",
        state.step,
        names,
        kept.name,
    )


def archive_checkpoints_after(run_dir: Path, state: TrainState) -> list[Path]:
    """Rename the run's checkpoints after `state`, so that no start resumes from them; their new names."""
    try:
        return [path.rename(abandoned_dir(path)) for path in _later(run_dir, state)]
    except OSError as error:
        reason = f"cannot be renamed ({error.strerror})"
        remedy = "make its folder writable, then run the same command again"
        raise OutputError(Problem("checkpoint", error.filename, reason, remedy)) from error


def _later(run_dir: Path, state: TrainState) -> list[Path]:
    return [path for path in not_foreign(run_dir, state.run_id) if step_of(path) > state.step]
