"""Judgement of each step by its loss, and the decision what to do. Pure: no tensor, no clock.

An update whose gradient is not finite is skipped (step.py). After several in a row, or several losses in a
row that are spikes:

    the learning rate is lowered for a while; if that does not help,
    the run rolls back to its last scheduled checkpoint and skips the data that it has read since;
    where that has happened too often, it stops.

A judgement depends on the configuration and the state alone, and the state is in every checkpoint. So a run
that was killed and resumes comes to the same judgements.
"""

from dataclasses import dataclass
from enum import StrEnum
from math import isfinite
from statistics import median

from llama_mcore.checkpoint.train_state import HealthState, Rollback, TrainState
from llama_mcore.train.config import HealthConfig

_SIGMAS_PER_MAD = 1.4826
"""Standard deviation of a normal distribution over its median absolute deviation."""
_SMALLEST_SIGMA = 1e-3
"""Least standard deviation relative to the median: where losses hardly scatter, rounding is no spike."""


class Action(StrEnum):
    GO_ON = "go on"
    LOWER_LR = "lower the learning rate"
    ROLL_BACK = "roll back"
    STOP = "stop"


@dataclass(frozen=True)
class Judgement:
    state: HealthState
    """State after the step."""
    action: Action = Action.GO_ON
    reason: str = ""


def judge(before: HealthState, config: HealthConfig, step: int, loss: float, skipped: bool) -> Judgement:
    """State after step `step`, counted from 1, and the action to take."""
    state = _with_step(before, config, loss, skipped)
    rounds, reason = _diagnosis(state, config)
    if not rounds:
        return Judgement(state)
    if config.lower_lr_steps and step > state.lowered_until and rounds == 1:
        lowered = {"lr_scale": config.lower_lr_factor, "lowered_until": step + config.lower_lr_steps}
        return Judgement(state.model_copy(update=lowered), Action.LOWER_LR, reason)
    recent = [past for past in state.rollbacks if past.at_step > step - config.rollback_window]
    if len(recent) >= config.max_rollbacks:
        tried = f"{len(recent)} rollbacks within {config.rollback_window:,} steps"
        return Judgement(state, Action.STOP, f"{reason}, after {tried}")
    return Judgement(state, Action.ROLL_BACK, reason)


def lr_scale(state: HealthState, step: int) -> float:
    """Factor of the learning rate of step `step`."""
    return state.lr_scale if step <= state.lowered_until else 1.0


def rolled_back(now: TrainState, checkpoint: TrainState, reason: str) -> TrainState:
    """State of a run that returns to `checkpoint` and continues with the data after `now`.

    Learning rate and known losses are the checkpoint's: what was read since is taken for the cause.
    """
    rollback = Rollback(
        at_step=now.step,
        to_step=checkpoint.step,
        first_sample=checkpoint.consumed_samples,
        end_sample=now.consumed_samples,
        reason=reason,
    )
    remembered = {"rollbacks": (*now.health.rollbacks, rollback), "last_scheduled": checkpoint.step}
    return TrainState(
        step=checkpoint.step,
        consumed_samples=now.consumed_samples,
        segments=now.segments,
        run_id=now.run_id,
        began_from=now.began_from,
        health=checkpoint.health.model_copy(update=remembered),
    )


def spike_score(losses: tuple[float, ...], loss: float) -> float:
    """Standard deviations that `loss` lies above the median of `losses`."""
    # Estimated by the median absolute deviation, which a spike among the losses hardly moves.
    middle = median(losses)
    sigma = _SIGMAS_PER_MAD * median(abs(past - middle) for past in losses)
    return (loss - middle) / max(sigma, _SMALLEST_SIGMA * abs(middle))


def _with_step(before: HealthState, config: HealthConfig, loss: float, skipped: bool) -> HealthState:
    if skipped or not isfinite(loss):
        skips = {"skipped": before.skipped + int(skipped), "skipped_in_a_row": before.skipped_in_a_row + 1}
        return before.model_copy(update=skips)
    full = len(before.losses) >= config.spike_window > 0
    if full and spike_score(before.losses, loss) > config.spike_threshold:
        # A spike stays out of what later losses are compared with.
        return before.model_copy(
            update={"skipped_in_a_row": 0, "spikes_in_a_row": before.spikes_in_a_row + 1}
        )
    kept = (*before.losses, loss)[-config.spike_window :] if config.spike_window else ()
    return before.model_copy(update={"skipped_in_a_row": 0, "spikes_in_a_row": 0, "losses": kept})


def _diagnosis(state: HealthState, config: HealthConfig) -> tuple[int, str]:
    """Number of times that action was due since the run was last stable, and the reason; 0 if none is due."""
    skipped, spikes = state.skipped_in_a_row, state.spikes_in_a_row
    if skipped and skipped % config.skipped_in_a_row == 0:
        reason = f"{skipped} updates in a row were skipped: loss or gradient was not finite"
        return skipped // config.skipped_in_a_row, reason
    if not skipped and spikes and spikes % config.spikes_in_a_row == 0:
        reason = f"{spikes} losses in a row are spikes above the {len(state.losses)} before"
        return spikes // config.spikes_in_a_row, reason
    return 0, ""
