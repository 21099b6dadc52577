"""llama_mcore.train.schedule: linear warm-up, then cosine to a share of the peak."""

import itertools

import pytest

from llama_mcore.train.config import OptimConfig
from llama_mcore.train.schedule import learning_rate

PEAK, STEPS = 3e-4, 1000


def rate(step: int, warmup_steps: int = 100, min_lr_ratio: float = 0.1, steps: int = STEPS) -> float:
    optim = OptimConfig(lr=PEAK, warmup_steps=warmup_steps, min_lr_ratio=min_lr_ratio)
    return learning_rate(step, steps, optim)


def test_warm_up_is_linear_and_ends_at_the_peak() -> None:
    assert rate(1) == pytest.approx(PEAK / 100)
    assert rate(50) == pytest.approx(PEAK / 2)
    assert rate(100) == PEAK


def test_half_of_the_decay_is_half_way_between_peak_and_end() -> None:
    assert rate(550) == pytest.approx(PEAK * (1 + 0.1) / 2)


def test_a_quarter_of_the_decay_is_on_the_cosine() -> None:
    assert rate(325) == pytest.approx(PEAK * (0.1 + 0.9 * (1 + 0.5**0.5) / 2))


def test_the_last_step_has_the_smallest_rate_and_it_stays_there() -> None:
    assert rate(STEPS) == pytest.approx(0.1 * PEAK)
    assert rate(STEPS, min_lr_ratio=0.0) == pytest.approx(0.0)
    assert rate(STEPS + 500) == pytest.approx(0.1 * PEAK)


def test_it_never_rises_after_the_warm_up() -> None:
    rates = [rate(step) for step in range(100, STEPS + 1)]
    assert all(later < earlier for earlier, later in itertools.pairwise(rates))


def test_no_warm_up_starts_on_the_cosine() -> None:
    assert rate(1, warmup_steps=0) == pytest.approx(PEAK, rel=1e-5)
    assert rate(STEPS, warmup_steps=0) == pytest.approx(0.1 * PEAK)


def test_a_run_that_is_all_warm_up_ends_at_the_peak() -> None:
    assert rate(100, steps=100) == PEAK


def test_it_depends_on_the_step_alone() -> None:
    forwards = [rate(step) for step in range(1, STEPS + 1)]
    assert [rate(step) for step in range(STEPS, 0, -1)] == forwards[::-1]
