"""A run that dies again and again before it has saved anything is not started a fourth time.

Five attempts of a run on two ranks: killed at the start (rank 1 alone, as on a broken node), a crash in the
set-up, a stall at the start; one of another job, which crashes too; and one that is told to retry.
"""

import signal
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from llama_mcore.observe.goodput.attempts import MAX_FRUITLESS, AttemptEnded, add_attempt, read_ended_attempts
from llama_mcore.observe.goodput.spans import read_attempts, spans_of
from tests.support.errors import is_shown
from tests.support.models import Small
from tests.support.product import metrics
from tests.train.attempts import (
    Attempt,
    Lived,
    ask,
    be_killed,
    fail,
    first_steps,
    live,
    read_what_never_comes,
)

pytestmark = pytest.mark.process

SETTINGS = ["parallel.tp=1", "train.steps=3", "optim.warmup_steps=0", "eval.interval=0"]
DEAD_ATTEMPT = AttemptEnded(
    began=1.0, ended=2.0, job="7", host="n1", ranks=2, exit_code=1, asked=False, saved=False, step=0
)
DEAD = ["killed", "crashed", "stalled"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("no-progress")


@pytest.fixture(scope="module")
def attempts(small: Small, folder: Path) -> dict[str, Lived]:
    def settings(run: str, *more: str) -> list[str]:
        return [*small.overrides(folder / run), *SETTINGS, *more]

    for run in ("anew", "dead"):
        for _ in range(MAX_FRUITLESS):
            add_attempt(folder / run, DEAD_ATTEMPT)
    impatient = settings("run", "watchdog.start_s=4")
    plain = Attempt(settings("run"), job="7")
    anew = Attempt(settings("anew", "--fresh"), partial(ask, signal.SIGUSR1), step=2, ranks=[0], job="7")
    todo = {
        "killed": replace(plain, fault=be_killed, phase="start", ranks=[1]),
        "crashed": replace(plain, fault=fail, phase="setup", ranks=[0, 1]),
        "stalled": Attempt(impatient, read_what_never_comes, phase="start", ranks=[0, 1], job="7"),
        "refused": plain,
        "other-job": replace(plain, fault=fail, step=2, ranks=[0, 1], job="8"),
        "refused-again": plain,
        "retried": Attempt(settings("run", "--retry"), job="7"),
        "again": plain,
        "not-anew": Attempt(settings("anew"), job="7"),
        "anew": anew,
        "anew-requeued": replace(anew, fault=None, restarts=1),
        "retry-requeued": Attempt(settings("dead", "--retry"), job="7", restarts=4),
    }
    return {name: live(attempt) for name, attempt in todo.items()}


def test_three_attempts_end_for_different_reasons(attempts: dict[str, Lived]) -> None:
    assert [attempts[name].first for name in DEAD] == [137, 1, 75]


@pytest.mark.parametrize("name", ["refused", "refused-again"])
def test_the_fourth_is_refused_with_93_and_says_why(
    attempts: dict[str, Lived], folder: Path, name: str
) -> None:
    found = attempts[name]
    assert found.codes == [93, 93]
    (said,) = [line for line in found.output.splitlines() if line.startswith("no progress: ")]
    assert is_shown(said, "run.dir", folder / "run")
    assert "--retry" in said
    for end in read_ended_attempts(folder / "run")[:MAX_FRUITLESS]:
        assert f" {end.exit_code} in step 0 on {end.host}" in said


def test_another_job_starts(attempts: dict[str, Lived]) -> None:
    assert attempts["other-job"].codes == [1, 1]


def test_it_is_retried_where_that_is_asked_for_and_then_goes_on(
    attempts: dict[str, Lived], folder: Path
) -> None:
    assert attempts["retried"].codes == [0, 0], attempts["retried"].output
    assert [row["step"] for row in metrics(folder / "run")] == [1, 2, 3]
    assert attempts["again"].codes == [0, 0]


def test_a_fresh_run_starts_and_has_no_past(attempts: dict[str, Lived], folder: Path) -> None:
    assert attempts["not-anew"].codes == [93, 93]
    assert attempts["anew"].codes == [75, 75], attempts["anew"].output
    assert [one.exit_code for one in read_ended_attempts(folder / "anew")] == [75, 0]
    (aside,) = folder.glob("anew.before-*")
    assert read_ended_attempts(aside) == [DEAD_ATTEMPT] * MAX_FRUITLESS


def test_a_job_that_was_put_back_does_not_start_from_scratch_again(
    attempts: dict[str, Lived], folder: Path
) -> None:
    found = attempts["anew-requeued"]
    assert found.codes == [0, 0], found.output
    assert "--fresh" in found.output  # that it did not count is said
    assert first_steps(folder / "anew") == [1, 3]
    assert [row["step"] for row in metrics(folder / "anew")] == [1, 2, 3]


def test_a_job_that_was_put_back_is_not_retried_for_ever(attempts: dict[str, Lived]) -> None:
    assert attempts["retry-requeued"].codes == [93, 93]


def test_every_attempt_is_written_down_once(attempts: dict[str, Lived], folder: Path) -> None:
    ended = read_ended_attempts(folder / "run")
    assert [(one.job, one.saved, one.step) for one in ended] == [
        *[("7", False, 0)] * 3,
        ("8", False, 2),
        ("7", True, 3),
        ("7", False, 3),
    ]
    assert [one.exit_code for one in ended[1:]] == [1, 75, 1, 0, 0]
    assert not any(one.asked for one in ended)


def test_goodput_has_those_that_never_trained(attempts: dict[str, Lived], folder: Path) -> None:
    found = read_attempts(folder / "run")
    spans = spans_of(found)
    assert len(found) == 6
    assert {span.kind for span in spans if span.attempt in (1, 3)} - {"down"} == {"restarting"}
    assert sum(span.seconds for span in spans) == pytest.approx(spans[-1].ended - spans[0].began, rel=1e-9)
