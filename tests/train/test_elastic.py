"""A run that comes back on another number of ranks computes what it would have computed.

4 ranks (tensor parallelism 2, ZeRO 1), then 2 (ZeRO 2), 1, and 4 again, each asked to stop after three steps;
and the same run undisturbed. Bound: two layouts differ by at most 1e-5 over five steps in fp32
(test_layouts.py derives it: rounding, which Adam makes as large as an update only where a gradient is about
zero). Twelve steps accumulate the differences of as many: 12/5 of that.
"""

import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tests.support.errors import is_shown
from tests.support.models import Small
from tests.support.product import metrics, train
from tests.train.attempts import Attempt, Lived, ask, first_steps, live

pytestmark = pytest.mark.process

STEPS = 12
TOLERANCE = 1e-5 * STEPS / 5
SAME = ["train.precision=fp32", f"train.steps={STEPS}", "eval.interval=0", "checkpoint.interval=100"]
FOUR = ["parallel.tp=2", "zero.stage=1"]
# Ranks, and all that is given with them; each in turn.
WORLDS = [
    (4, FOUR),
    (2, ["parallel.tp=1", "zero.stage=2"]),
    (1, ["parallel.tp=1", "zero.stage=2", "train.micro_batch_size=4"]),
    (4, FOUR),
]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("elastic") / "run"


@pytest.fixture(scope="module")
def attempts(small: Small, run_dir: Path) -> list[Lived]:
    run = [*small.overrides(run_dir), *SAME]
    attempts = [
        Attempt([*run, *settings], partial(ask, signal.SIGUSR1), step=3 * number, ranks=[0], world_size=ranks)
        for number, (ranks, settings) in enumerate(WORLDS[:-1], start=1)
    ]
    ranks, settings = WORLDS[-1]
    return [live(attempt) for attempt in (*attempts, Attempt([*run, *settings], world_size=ranks))]


@pytest.fixture(scope="module")
def whole(uninterrupted: Callable[..., Path]) -> Path:
    return uninterrupted([*SAME, *FOUR], ranks=4)


def test_each_goes_on_where_the_one_before_stopped(attempts: list[Lived], run_dir: Path) -> None:
    *stopped, last = attempts
    assert [attempt.codes for attempt in stopped] == [[75] * 4, [75] * 2, [75]], stopped[-1].output
    assert last.codes == [0] * 4, last.output
    assert first_steps(run_dir) == [1, 4, 7, 10]


def test_the_data_and_their_order_are_the_same(attempts: list[Lived], run_dir: Path, whole: Path) -> None:
    found, expected = metrics(run_dir), metrics(whole)
    for key in ("step", "tokens", "windows", "lr"):
        assert [row[key] for row in found] == [row[key] for row in expected]
    assert len(found) == STEPS


def test_the_losses_are_those_of_the_undisturbed_run(
    attempts: list[Lived], run_dir: Path, whole: Path
) -> None:
    """Gradient norms too: a window more or less would change both by far more."""
    found, expected = metrics(run_dir), metrics(whole)
    for key in ("loss", "grad_norm"):
        assert [row[key] for row in found] == pytest.approx([row[key] for row in expected], rel=TOLERANCE)
    assert [row["loss"] for row in found] != pytest.approx([expected[0]["loss"]] * STEPS, rel=100 * TOLERANCE)


def test_a_number_of_ranks_that_does_not_fit_is_refused_with_those_that_do(
    small: Small, tmp_path: Path
) -> None:
    refused = train([*small.overrides(tmp_path / "run"), *SAME, "parallel.tp=1"], ranks=3)
    assert refused.exit_codes == [64] * 3
    assert is_shown(refused.output, "train.global_batch_size", 8)
    assert "2 * 3 = 6" in refused.output
    assert "2 or 4 ranks" in refused.output
