"""Is the run still healthy? Judges each step by its loss and decides what is done. Pure: no tensor, no clock.

    an update with a gradient that is not finite is skipped (step.py); so many in a row, or so many losses
    in a row that stand out, and
        the learning rate is lowered for a while; if that does not end it,
        the run rolls back to its last scheduled checkpoint and jumps over what it has read since;
        where that was done too often, it stops.

All that a judgement depends on is the configuration and the state, which is in every checkpoint. So a run
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
"""Relative to the median loss: where losses hardly scatter, rounding is no spike."""


class Action(StrEnum):
    GO_ON = "go on"
    LOWER_LR = "lower the learning rate"
    ROLL_BACK = "roll back"
    STOP = "stop"


@dataclass(frozen=True)
class Judgement:
    state: HealthState
    """After the step."""
    action: Action = Action.GO_ON
    reason: str = ""


def judge(before: HealthState, config: HealthConfig, step: int, loss: float, skipped: bool) -> Judgement:
    """What to do after step `step`, counted from 1."""
    state = _with_step(before, config, loss, skipped)
    rounds, reason = _complaint(state, config)
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
    """What the learning rate of step `step` is multiplied with."""
    return state.lr_scale if step <= state.lowered_until else 1.0


def rolled_back(now: TrainState, checkpoint: TrainState, reason: str) -> TrainState:
    """The state of a run that returns to `checkpoint` and goes on with the data that comes after `now`.

    The learning rate and what was known of the losses are those of the checkpoint: what was read since is
    taken for the cause, and is gone.
    """
    rollback = Rollback(
        at_step=now.step,
        to_step=checkpoint.step,
        first_sample=checkpoint.consumed_samples,
        end_sample=now.consumed_samples,
        reason=reason,
    )
    remembered = {"rollbacks": (*now.health.rollbacks, rollback), "anchor": checkpoint.step}
    return TrainState(
        step=checkpoint.step,
        consumed_samples=now.consumed_samples,
        segments=now.segments,
        run_id=now.run_id,
        began_from=now.began_from,
        health=checkpoint.health.model_copy(update=remembered),
    )


def spike_score(losses: tuple[float, ...], loss: float) -> float:
    """How many standard deviations `loss` lies above the median of `losses`, by their median absolute
    deviation, which a spike among them hardly moves."""
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


def _complaint(state: HealthState, config: HealthConfig) -> tuple[int, str]:
    """How often action was called for since the run was last quiet, and by what; 0 if nothing does now."""
    skipped, spikes = state.skipped_in_a_row, state.spikes_in_a_row
    if skipped and skipped % config.skipped_in_a_row == 0:
        reason = f"{skipped} updates in a row were skipped: loss or gradient was not finite"
        return skipped // config.skipped_in_a_row, reason
    if not skipped and spikes and spikes % config.spikes_in_a_row == 0:
        reason = f"{spikes} losses in a row stand out from the {len(state.losses)} before"
        return spikes // config.spikes_in_a_row, reason
    return 0, ""
