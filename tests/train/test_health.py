"""llama_mcore.train.health: what is decided, and that it is decided again from any point."""

from dataclasses import replace
from math import inf, nan

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_mcore.checkpoint.train_state import HealthState, TrainState
from llama_mcore.train.config import HealthConfig
from llama_mcore.train.health import Action, judge, lr_scale, rolled_back, spike_score

CONFIG = HealthConfig(
    skipped_in_a_row=2,
    spike_window=5,
    spike_threshold=6.0,
    spikes_in_a_row=2,
    lower_lr_factor=0.5,
    lower_lr_steps=4,
    max_rollbacks=2,
    rollback_window=50,
)
BATCH, INTERVAL = 8, 4
CALM = (2.0, 2.1, 1.9, 2.0, 2.1)
SKIPPED, SPIKE = (nan, True), (9.0, False)


def actions(outcomes: list[tuple[float, bool]], config: HealthConfig = CONFIG) -> list[str]:
    state, found = HealthState(losses=CALM), []
    for step, (loss, skipped) in enumerate(outcomes, 1):
        judgement = judge(state, config, step, loss, skipped)
        state = judgement.state
        found.append(judgement.action.name)
    return found


@pytest.mark.parametrize("trouble", [SKIPPED, SPIKE])
def test_first_the_rate_is_lowered_then_the_run_rolls_back(trouble: tuple[float, bool]) -> None:
    assert actions([trouble] * 4) == ["GO_ON", "LOWER_LR", "GO_ON", "ROLL_BACK"]


@pytest.mark.parametrize("trouble", [SKIPPED, SPIKE])
def test_trouble_that_ends_is_forgotten(trouble: tuple[float, bool]) -> None:
    calm = (2.0, False)
    assert actions([trouble, calm, trouble, calm]) == ["GO_ON"] * 4


def test_trouble_that_returns_while_the_rate_is_lowered_rolls_back() -> None:
    outcomes = [SKIPPED, SKIPPED, (2.0, False), SKIPPED, SKIPPED]
    assert actions(outcomes)[-1] == "ROLL_BACK"
    later = [*outcomes[:3], *[(2.0, False)] * 4, SKIPPED, SKIPPED]
    assert actions(later)[-1] == "LOWER_LR"


def test_trouble_that_outlasts_the_lower_rate_rolls_back() -> None:
    short = CONFIG.model_copy(update={"lower_lr_steps": 1})
    assert actions([SKIPPED] * 4, short)[-1] == "ROLL_BACK"


def test_without_lower_rate_the_run_rolls_back_at_once() -> None:
    assert actions([SKIPPED] * 2, CONFIG.model_copy(update={"lower_lr_steps": 0}))[-1] == "ROLL_BACK"


def test_without_rollbacks_the_run_stops() -> None:
    assert actions([SKIPPED] * 4, CONFIG.model_copy(update={"max_rollbacks": 0}))[-1] == "STOP"


def test_the_rate_is_lowered_for_the_steps_that_follow() -> None:
    judgement = judge(HealthState(skipped_in_a_row=1), CONFIG, 10, nan, True)
    assert judgement.action is Action.LOWER_LR
    assert [lr_scale(judgement.state, step) for step in (11, 14, 15)] == [0.5, 0.5, 1.0]


def test_the_score_is_that_of_a_normal_distribution() -> None:
    """Median 2, deviations 0, 0, 0.1, 0.1, 0.2: their median 0.1 is 0.1 * 1.4826 standard deviations."""
    losses = (2.0, 2.0, 2.1, 1.9, 2.2)
    assert spike_score(losses, 2.5) == pytest.approx(0.5 / 0.14826)
    assert spike_score(losses, 1.0) < 0


def test_one_spike_among_the_losses_hides_no_other() -> None:
    assert spike_score((*CALM, 50.0), 9.0) > CONFIG.spike_threshold


def test_equal_losses_make_no_spike_of_rounding() -> None:
    assert spike_score((2.0,) * 5, 2.0001) < 1


def test_nothing_is_a_spike_before_there_are_enough_losses() -> None:
    state = HealthState(losses=CALM[:-1])
    assert judge(state, CONFIG, 1, 99.0, False).state.spikes_in_a_row == 0
    assert judge(HealthState(losses=CALM), CONFIG, 1, 99.0, False).state.spikes_in_a_row == 1


def test_spikes_are_not_what_later_losses_are_compared_with() -> None:
    state = judge(HealthState(losses=CALM), CONFIG, 1, 9.0, False).state
    assert state.losses == CALM
    assert judge(state, CONFIG, 2, 2.2, False).state.losses == (*CALM[1:], 2.2)


def test_a_window_of_none_looks_for_no_spikes() -> None:
    off = CONFIG.model_copy(update={"spike_window": 0})
    assert judge(HealthState(losses=CALM), off, 1, 1e9, False).state == HealthState(losses=())


@pytest.mark.parametrize("loss", [nan, inf, 2.0])
def test_a_skipped_update_is_counted_and_its_loss_is_not(loss: float) -> None:
    state = judge(HealthState(losses=CALM), CONFIG, 7, loss, True).state
    assert (state.skipped, state.skipped_in_a_row, state.losses) == (1, 1, CALM)
    assert TrainState(step=7, health=state).updates == 6


def test_a_rollback_takes_weights_back_and_data_on() -> None:
    remembered = HealthState(skipped=1, losses=(2.0,))
    checkpoint = TrainState(4, 40, run_id="r", health=remembered)
    now = TrainState(9, 80, run_id="r", health=HealthState(skipped=5, lr_scale=0.5, lowered_until=99))
    state = rolled_back(now, checkpoint, "why")
    assert (state.step, state.consumed_samples, state.updates) == (4, 80, 3)
    assert state.health.losses == (2.0,)
    assert lr_scale(state.health, 5) == 1.0
    (past,) = state.health.rollbacks
    assert past.model_dump() == {
        "at_step": 9,
        "to_step": 4,
        "first_sample": 40,
        "end_sample": 80,
        "reason": "why",
    }


class Run:
    """A run whose outcomes are a function of the data alone, with a checkpoint every INTERVAL quiet steps."""

    def __init__(self, outcomes: list[tuple[float, bool]], state: TrainState) -> None:
        self.outcomes, self.state, self.checkpoint = outcomes, state, state
        self.decided: list[tuple[int, int, str]] = []

    def step(self) -> bool:
        """Take a step and return whether the run goes on."""
        number = self.state.consumed_samples // BATCH
        if number >= len(self.outcomes):
            return False
        step = self.state.step + 1
        judgement = judge(self.state.health, CONFIG, step, *self.outcomes[number])
        self.state = TrainState(step, self.state.consumed_samples + BATCH, health=judgement.state)
        self.decided.append((step, number, judgement.action.name))
        if judgement.action is Action.ROLL_BACK:
            self.state = self.checkpoint = rolled_back(self.state, self.checkpoint, judgement.reason)
        elif step % INTERVAL == 0 and self.state.health.is_stable:
            self.checkpoint = replace(
                self.state, health=self.state.health.model_copy(update={"last_scheduled": step})
            )
            self.state = self.checkpoint
        return judgement.action is not Action.STOP


OUTCOMES = st.lists(
    st.one_of(
        st.just((2.0, False)),
        st.just(SKIPPED),
        st.tuples(st.floats(1.8, 2.2), st.just(False)),
        st.tuples(st.floats(3, 20), st.just(False)),
    ).flatmap(lambda outcome: st.integers(1, 6).map(lambda times: [outcome] * times)),
    max_size=40,
).map(lambda runs: [outcome for run in runs for outcome in run])


@given(outcomes=OUTCOMES, killed_after=st.integers(0, 200))
@settings(max_examples=300)
def test_a_killed_run_decides_again_as_the_whole_one(
    outcomes: list[tuple[float, bool]], killed_after: int
) -> None:
    whole = Run(outcomes, TrainState())
    checkpoints = []
    while whole.step():
        checkpoints.append((len(whole.decided), whole.checkpoint))
    if not checkpoints:
        return
    _, checkpoint = checkpoints[min(killed_after, len(checkpoints) - 1)]
    made_after = next(count for count, made in checkpoints if made is checkpoint)
    restored = HealthState.model_validate_json(checkpoint.health.model_dump_json())
    resumed = Run(outcomes, replace(checkpoint, health=restored))
    while resumed.step():
        pass
    if checkpoint.step or checkpoint.health.rollbacks:
        assert resumed.decided == whole.decided[made_after:]
    else:
        assert resumed.decided == whole.decided
    assert resumed.state == whole.state


@given(outcomes=OUTCOMES)
@settings(max_examples=300)
def test_never_more_rollbacks_than_the_limit(outcomes: list[tuple[float, bool]]) -> None:
    run = Run(outcomes, TrainState())
    while run.step():
        pass
    at_steps = [past.at_step for past in run.state.health.rollbacks]
    for at_step in at_steps:
        recent = [step for step in at_steps if at_step - CONFIG.rollback_window < step <= at_step]
        assert len(recent) <= CONFIG.max_rollbacks
    samples = [(past.first_sample, past.end_sample) for past in run.state.health.rollbacks]
    assert all(first < end for first, end in samples)
    assert samples == sorted(samples)
