"""Rollback: back to the last good checkpoint without leaving the process, and past the data read since."""

from functools import partial
from pathlib import Path

from llama_mcore.checkpoint.loader import load_checkpoint
from llama_mcore.checkpoint.paths import step_of, unreadable
from llama_mcore.checkpoint.reader import CheckpointReader
from llama_mcore.checkpoint.run_dir import not_foreign
from llama_mcore.checkpoint.train_state import TrainState
from llama_mcore.data.data_plan import check_caps
from llama_mcore.distributed.collectives import broadcast_from_rank0, run_on_all_ranks
from llama_mcore.distributed.groups import Groups
from llama_mcore.errors import CheckpointError, DataError, NumericalError, Problem
from llama_mcore.observe.log import get_logger
from llama_mcore.observe.phases import Phases
from llama_mcore.train.config import TrainConfig
from llama_mcore.train.engine import DeepSpeedEngine
from llama_mcore.train.health import rolled_back
from llama_mcore.train.resume import open_verified


def roll_back(
    engine: DeepSpeedEngine,
    groups: Groups,
    run_dir: Path,
    train: TrainConfig,
    now: TrainState,
    reason: str,
    phases: Phases,
) -> TrainState:
    """Load the checkpoint to return to into `engine`; returns the state to continue from.

    No save may be in flight, and no checkpoint holds the new state yet. Raises NumericalError, before
    anything changes, where there is no valid checkpoint or too little data left.
    Collective: all ranks call it.
    """
    reader = _checkpoint_to_return_to(run_dir, groups, now, reason, phases)
    state = rolled_back(now, reader.state, reason)
    run_on_all_ranks(groups, lambda: _check_data(train, state))
    run_on_all_ranks(groups, lambda: load_checkpoint(engine, reader, groups, phases))
    get_logger().warning(
        "ROLLED BACK from step %d to %s and skipped samples %d to %d: %s",
        now.step,
        reader.path,
        reader.state.consumed_samples,
        state.consumed_samples,
        reason,
    )
    return state


def _checkpoint_to_return_to(
    run_dir: Path, groups: Groups, now: TrainState, reason: str, phases: Phases
) -> CheckpointReader:
    """Newest checkpoint that was scheduled and is valid, the same on all ranks.

    Collective: all ranks call it.
    """
    folders = broadcast_from_rank0(groups, lambda: _candidates(run_dir, now))
    for folder in reversed(folders):
        try:
            reader = run_on_all_ranks(groups, partial(open_verified, folder, groups, phases))
        except CheckpointError as error:
            get_logger().warning("%s IS DAMAGED and skipped: %s", folder, error.message())
            continue
        if reader.state.health.is_stable:
            return reader
    remedy = "lower optim.lr or check the data, and start from scratch"
    missing = f"and there is no valid checkpoint up to step {now.health.last_scheduled:,} to roll back to"
    raise NumericalError(Problem(f"step {now.step:,}", reason, missing, remedy))


def _candidates(run_dir: Path, now: TrainState) -> list[Path]:
    try:
        folders = not_foreign(run_dir, now.run_id)
    except OSError as error:
        raise unreadable(error) from None
    return [folder for folder in folders if step_of(folder) <= now.health.last_scheduled]


def _check_data(train: TrainConfig, state: TrainState) -> None:
    """Raise NumericalError where too little data is left: abandoned steps are done again with other data."""
    end = state.consumed_samples + (train.steps - state.step) * train.global_batch_size
    try:
        check_caps(state.segments[-1], end)
    except DataError as error:
        last = state.health.rollbacks[-1]
        reason = f"calls for a rollback to step {last.to_step:,}, after which too little data would be left"
        problem = Problem(f"step {last.at_step:,}", last.reason, reason)
        raise NumericalError([problem, *error.problems]) from None
