"""A run that dies again and again before it has saved anything is not started a fourth time.

Five lives of a run on two ranks: killed at the start (rank 1 alone, as on a broken node), a crash in the
set-up, a stall at the start; one of another job, which crashes too; and one that is told to retry.
"""

import signal
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from llama_mcore.observe.goodput.attempts import EndedLife, add_life, read_ended_lives
from llama_mcore.observe.goodput.no_progress import LIVES
from llama_mcore.observe.goodput.spans import read_lives, spans_of
from tests.support.errors import is_shown
from tests.support.models import Small
from tests.support.product import metrics
from tests.train.lives import (
    Life,
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
DEAD_LIFE = EndedLife(
    began=1.0, ended=2.0, job="7", host="n1", ranks=2, exit_code=1, asked=False, saved=False, step=0
)
DEAD = ["killed", "crashed", "stalled"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("no-progress")


@pytest.fixture(scope="module")
def lives(small: Small, folder: Path) -> dict[str, Lived]:
    def settings(run: str, *more: str) -> list[str]:
        return [*small.overrides(folder / run), *SETTINGS, *more]

    for run in ("anew", "dead"):
        for _ in range(LIVES):
            add_life(folder / run, DEAD_LIFE)
    impatient = settings("run", "watchdog.start_s=4")
    plain = Life(settings("run"), job="7")
    anew = Life(settings("anew", "--fresh"), partial(ask, signal.SIGUSR1), step=2, ranks=[0], job="7")
    todo = {
        "killed": replace(plain, fault=be_killed, phase="start", ranks=[1]),
        "crashed": replace(plain, fault=fail, phase="setup", ranks=[0, 1]),
        "stalled": Life(impatient, read_what_never_comes, phase="start", ranks=[0, 1], job="7"),
        "refused": plain,
        "other-job": replace(plain, fault=fail, step=2, ranks=[0, 1], job="8"),
        "refused-again": plain,
        "retried": Life(settings("run", "--retry"), job="7"),
        "again": plain,
        "not-anew": Life(settings("anew"), job="7"),
        "anew": anew,
        "anew-requeued": replace(anew, fault=None, restarts=1),
        "retry-requeued": Life(settings("dead", "--retry"), job="7", restarts=4),
    }
    return {name: live(life) for name, life in todo.items()}


def test_three_lives_end_for_different_reasons(lives: dict[str, Lived]) -> None:
    assert [lives[name].first for name in DEAD] == [137, 1, 75]


@pytest.mark.parametrize("name", ["refused", "refused-again"])
def test_the_fourth_is_refused_with_93_and_says_why(lives: dict[str, Lived], folder: Path, name: str) -> None:
    found = lives[name]
    assert found.codes == [93, 93]
    (said,) = [line for line in found.output.splitlines() if line.startswith("no progress: ")]
    assert is_shown(said, "run.dir", folder / "run")
    assert "--retry" in said
    for end in read_ended_lives(folder / "run")[:LIVES]:
        assert f" {end.exit_code} in step 0 on {end.host}" in said


def test_another_job_starts(lives: dict[str, Lived]) -> None:
    assert lives["other-job"].codes == [1, 1]


def test_it_is_retried_where_that_is_asked_for_and_then_goes_on(
    lives: dict[str, Lived], folder: Path
) -> None:
    assert lives["retried"].codes == [0, 0], lives["retried"].output
    assert [row["step"] for row in metrics(folder / "run")] == [1, 2, 3]
    assert lives["again"].codes == [0, 0]


def test_a_fresh_run_starts_and_has_no_past(lives: dict[str, Lived], folder: Path) -> None:
    assert lives["not-anew"].codes == [93, 93]
    assert lives["anew"].codes == [75, 75], lives["anew"].output
    assert [one.exit_code for one in read_ended_lives(folder / "anew")] == [75, 0]
    (aside,) = folder.glob("anew.before-*")
    assert read_ended_lives(aside) == [DEAD_LIFE] * LIVES


def test_a_job_that_was_put_back_does_not_begin_anew_again(lives: dict[str, Lived], folder: Path) -> None:
    found = lives["anew-requeued"]
    assert found.codes == [0, 0], found.output
    assert "--fresh" in found.output  # that it did not count is said
    assert first_steps(folder / "anew") == [1, 3]
    assert [row["step"] for row in metrics(folder / "anew")] == [1, 2, 3]


def test_a_job_that_was_put_back_is_not_retried_for_ever(lives: dict[str, Lived]) -> None:
    assert lives["retry-requeued"].codes == [93, 93]


def test_every_life_is_written_down_once(lives: dict[str, Lived], folder: Path) -> None:
    ended = read_ended_lives(folder / "run")
    assert [(one.job, one.saved, one.step) for one in ended] == [
        *[("7", False, 0)] * 3,
        ("8", False, 2),
        ("7", True, 3),
        ("7", False, 3),
    ]
    assert [one.exit_code for one in ended[1:]] == [1, 75, 1, 0, 0]
    assert not any(one.asked for one in ended)


def test_goodput_has_those_that_never_trained(lives: dict[str, Lived], folder: Path) -> None:
    found = read_lives(folder / "run")
    spans = spans_of(found)
    assert len(found) == 6
    assert {span.kind for span in spans if span.life in (1, 3)} - {"down"} == {"restarting"}
    assert sum(span.seconds for span in spans) == pytest.approx(spans[-1].ended - spans[0].began, rel=1e-9)
