"""llama_mcore.observe.goodput.attempts: attempts without progress after which a run is not started again."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_mcore.errors import NoProgressError
from llama_mcore.observe.goodput.attempts import (
    MAX_FRUITLESS,
    AttemptEnded,
    AttemptStarted,
    add_attempt,
    check_progress,
    last_fruitless,
    made_no_progress,
)
from tests.support.errors import refused

CODES = (0, 1, 2, 64, 65, 66, 69, 70, 73, 75, 93, 134, 137, 139)


def attempt(exit_code: int, job: str = "", asked: bool = False, saved: bool = False) -> AttemptEnded:
    where = {"job": job, "host": "n7", "ranks": 2, "step": 12}
    return AttemptEnded(began=100.0, ended=131.0, exit_code=exit_code, asked=asked, saved=saved, **where)


JOBS = st.sampled_from(["", "1", "2"])
any_attempt = st.builds(attempt, st.sampled_from(CODES), JOBS, st.booleans(), st.booleans())


def refuses(attempts: list[AttemptEnded], job: str) -> bool:
    return len(last_fruitless(attempts, job)) >= MAX_FRUITLESS


@pytest.mark.parametrize("code", CODES)
def test_an_end_without_an_explanation_is_fruitless(code: int) -> None:
    assert made_no_progress(attempt(code)) is (code in (1, 2, 70, 75, 134, 137, 139))
    assert not made_no_progress(attempt(code, saved=True))


def test_a_request_explains_75_alone() -> None:
    assert not made_no_progress(attempt(75, asked=True))
    assert made_no_progress(attempt(75, asked=False))  # the watchdog's
    assert made_no_progress(attempt(143, asked=True))


@given(st.lists(any_attempt, max_size=12), JOBS)
def test_the_rule(attempts: list[AttemptEnded], job: str) -> None:
    """The last three of the job, and nothing else, decide."""
    own = [one for one in attempts if not job or one.job == job]
    assert refuses(attempts, job) == (
        len(own) >= MAX_FRUITLESS and all(made_no_progress(one) for one in own[-MAX_FRUITLESS:])
    )


@given(st.lists(any_attempt, max_size=8))
def test_a_new_job_starts_whatever_was(attempts: list[AttemptEnded]) -> None:
    assert not refuses(attempts, "3")


@given(st.lists(any_attempt, max_size=8), JOBS)
def test_a_checkpoint_breaks_the_row(attempts: list[AttemptEnded], job: str) -> None:
    assert not refuses([*attempts, attempt(137, job, saved=True), attempt(1, job), attempt(1, job)], job)
    assert refuses([*attempts, *[attempt(137, job)] * MAX_FRUITLESS], job)


def test_an_attempt_that_nobody_saw_end_counts(tmp_path: Path) -> None:
    killed = AttemptStarted(began=1.0, job="7", host="n7", ranks=2, saved=False, step=0)
    for began in range(MAX_FRUITLESS):
        check_progress(tmp_path, "7")
        add_attempt(tmp_path, killed.model_copy(update={"began": float(began)}))
    with refused(NoProgressError, "run.dir", tmp_path) as caught:
        check_progress(tmp_path, "7")
    assert "n7" in caught.value.message()
    add_attempt(tmp_path, killed.model_copy(update={"began": 9.0, "saved": True}))
    check_progress(tmp_path, "7")


def test_the_message_says_how_they_ended_and_what_to_do(tmp_path: Path) -> None:
    check_progress(tmp_path / "nowhere", "")
    for code in (0, 1, 137, 75):
        check_progress(tmp_path, "7")
        add_attempt(tmp_path, attempt(code, "7"))
    with refused(NoProgressError, "run.dir", tmp_path) as caught:
        check_progress(tmp_path, "7")
    assert caught.value.exit_code == 93
    for part in ("1 in step 12 on n7", "31 s", "137 in step 12", "75 in step 12", "--retry"):
        assert part in caught.value.message()
    check_progress(tmp_path, "8")
