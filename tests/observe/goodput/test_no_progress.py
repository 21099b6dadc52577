"""llama_mcore.observe.goodput.no_progress: when a run may not be started again."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_mcore.errors import NoProgressError
from llama_mcore.observe.goodput.attempts import EndedLife, NotedLife, add_life
from llama_mcore.observe.goodput.no_progress import LIVES, check_progress, is_fruitless, last_fruitless
from tests.support.errors import refused

CODES = (0, 1, 2, 64, 65, 66, 69, 70, 73, 75, 93, 134, 137, 139)


def life(exit_code: int, job: str = "", asked: bool = False, saved: bool = False) -> EndedLife:
    where = {"job": job, "host": "n7", "ranks": 2, "step": 12}
    return EndedLife(began=100.0, ended=131.0, exit_code=exit_code, asked=asked, saved=saved, **where)


JOBS = st.sampled_from(["", "1", "2"])
any_life = st.builds(life, st.sampled_from(CODES), JOBS, st.booleans(), st.booleans())


def refuses(lives: list[EndedLife], job: str) -> bool:
    return len(last_fruitless(lives, job)) >= LIVES


@pytest.mark.parametrize("code", CODES)
def test_an_end_without_an_explanation_is_fruitless(code: int) -> None:
    assert is_fruitless(life(code)) is (code in (1, 2, 70, 75, 134, 137, 139))
    assert not is_fruitless(life(code, saved=True))


def test_a_request_explains_75_alone() -> None:
    assert not is_fruitless(life(75, asked=True))
    assert is_fruitless(life(75, asked=False))  # the watchdog's
    assert is_fruitless(life(143, asked=True))


@given(st.lists(any_life, max_size=12), JOBS)
def test_the_rule(lives: list[EndedLife], job: str) -> None:
    """The last three of the job, and nothing else, decide."""
    own = [one for one in lives if not job or one.job == job]
    assert refuses(lives, job) == (len(own) >= LIVES and all(is_fruitless(one) for one in own[-LIVES:]))


@given(st.lists(any_life, max_size=8))
def test_a_new_job_starts_whatever_was(lives: list[EndedLife]) -> None:
    assert not refuses(lives, "3")


@given(st.lists(any_life, max_size=8), JOBS)
def test_a_checkpoint_breaks_the_row(lives: list[EndedLife], job: str) -> None:
    assert not refuses([*lives, life(137, job, saved=True), life(1, job), life(1, job)], job)
    assert refuses([*lives, *[life(137, job)] * LIVES], job)


def test_a_life_that_nobody_saw_end_counts(tmp_path: Path) -> None:
    killed = NotedLife(began=1.0, job="7", host="n7", ranks=2, saved=False, step=0)
    for began in range(LIVES):
        check_progress(tmp_path, "7")
        add_life(tmp_path, killed.model_copy(update={"began": float(began)}))
    with refused(NoProgressError, "run.dir", tmp_path) as caught:
        check_progress(tmp_path, "7")
    assert "n7" in caught.value.message()
    add_life(tmp_path, killed.model_copy(update={"began": 9.0, "saved": True}))
    check_progress(tmp_path, "7")


def test_the_message_says_how_they_ended_and_what_to_do(tmp_path: Path) -> None:
    check_progress(tmp_path / "nowhere", "")
    for code in (0, 1, 137, 75):
        check_progress(tmp_path, "7")
        add_life(tmp_path, life(code, "7"))
    with refused(NoProgressError, "run.dir", tmp_path) as caught:
        check_progress(tmp_path, "7")
    assert caught.value.exit_code == 93
    for part in ("1 in step 12 on n7", "31 s", "137 in step 12", "75 in step 12", "--retry"):
        assert part in caught.value.message()
    check_progress(tmp_path, "8")
