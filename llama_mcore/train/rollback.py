"""Return a run to its last good checkpoint without leaving the process, and jump over what it read since."""

from pathlib import Path

from llama_mcore.checkpoint.loader import load_checkpoint
from llama_mcore.checkpoint.paths import not_foreign, step_of, unreadable
from llama_mcore.checkpoint.reader import CheckpointReader
from llama_mcore.checkpoint.train_state import TrainState
from llama_mcore.config.schema import RunConfig
from llama_mcore.data.data_plan import check_caps
from llama_mcore.distributed.groups import Groups
from llama_mcore.errors import CheckpointError, DataError, NumericalError, Problem
from llama_mcore.observe.log import get_logger
from llama_mcore.observe.phases import Phases
from llama_mcore.train.engine import DeepSpeedEngine
from llama_mcore.train.health import rolled_back
from llama_mcore.train.resume import Together, broadcast_from_rank0, put_aside, verified


def roll_back(
    engine: DeepSpeedEngine,
    run: RunConfig,
    groups: Groups,
    now: TrainState,
    reason: str,
    together: Together,
    phases: Phases,
) -> TrainState:
    """Fill `engine` from the checkpoint to return to, and return the state to go on from, which no checkpoint
    holds yet.

    No save may be in flight. All ranks call it together; `phases` are told of what it reads. Raises
    NumericalError, before anything is changed, where there is no valid checkpoint or not enough data to jump
    over what was read since.
    """
    reader = _checkpoint_to_return_to(run, groups, now, reason, together, phases)
    state = rolled_back(now, reader.state, reason)
    together(lambda: _check_data(run, state))
    together(lambda: load_checkpoint(engine, reader, groups, phases))
    together(lambda: put_aside(Path(run.run.dir), state) if groups.rank == 0 else None)
    get_logger().warning(
        "ROLLED BACK from step %d to %s and jumped over samples %d to %d: %s",
        now.step,
        reader.path,
        reader.state.consumed_samples,
        state.consumed_samples,
        reason,
    )
    return state


def _checkpoint_to_return_to(
    run: RunConfig, groups: Groups, now: TrainState, reason: str, together: Together, phases: Phases
) -> CheckpointReader:
    """The newest that was scheduled and is valid; every rank gets the same."""
    folders = broadcast_from_rank0(groups, lambda: _candidates(Path(run.run.dir), now), together)
    for folder in reversed(folders):
        try:
            reader: CheckpointReader = together(lambda folder=folder: verified(folder, groups, phases))  # type: ignore[misc]
        except CheckpointError as error:
            get_logger().warning("%s IS DAMAGED and passed over: %s", folder, error.message())
            continue
        if reader.state.health.is_stable:
            return reader
    remedy = "lower optim.lr or look at the data, and start from scratch"
    why = f"and there is no valid checkpoint up to step {now.health.anchor:,} to roll back to"
    raise NumericalError(Problem(f"step {now.step:,}", reason, why, remedy))


def _candidates(run_dir: Path, now: TrainState) -> list[Path]:
    try:
        folders = not_foreign(run_dir, now.run_id)
    except OSError as error:
        raise unreadable(error) from None
    return [folder for folder in folders if step_of(folder) <= now.health.anchor]


def _check_data(run: RunConfig, state: TrainState) -> None:
    """The steps that were given up are done again with other data: is there enough?"""
    end = state.consumed_samples + (run.train.steps - state.step) * run.train.global_batch_size
    try:
        check_caps(state.segments[-1], end)
    except DataError as error:
        last = state.health.rollbacks[-1]
        reason = f"calls for a rollback to step {last.to_step:,}, after which the data would not suffice"
        problem = Problem(f"step {last.at_step:,}", last.reason, reason)
        raise NumericalError([problem, *error.problems]) from None
