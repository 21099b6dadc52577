"""llama_mcore.observe.goodput.attempts: what is added is read back, whatever a kill or a full disk left
between."""

import errno
import os
import stat
from pathlib import Path

import pytest

from llama_mcore.observe.goodput.attempts import (
    ATTEMPTS_FILE,
    AttemptEnded,
    AttemptStarted,
    add_attempt,
    is_requeued,
    read_ended_attempts,
    read_noted_attempts,
)


def attempt(exit_code: int, began: float = 1763920000.123) -> AttemptEnded:
    facts = {"job": "4711", "host": "n1", "ranks": 2, "asked": False, "saved": True, "step": 7}
    return AttemptEnded(began=began, ended=began + 1.5, exit_code=exit_code, **facts)


def test_what_is_added_is_read_back_in_order(tmp_path: Path) -> None:
    run_dir = tmp_path / "not/there"
    attempts = [attempt(137), attempt(0, began=1.1e9 + 0.1)]
    for one in attempts:
        add_attempt(run_dir, one)
    assert read_ended_attempts(run_dir) == attempts


def test_the_last_line_of_an_attempt_stands_at_the_place_of_its_first(tmp_path: Path) -> None:
    first, second = attempt(1, began=1.0), attempt(0, began=2.0)
    for one in (AttemptStarted(**noted(first)), AttemptStarted(**noted(second) | {"saved": False}), first):
        add_attempt(tmp_path, one)
    assert read_noted_attempts(tmp_path) == [first, AttemptStarted(**noted(second) | {"saved": False})]
    assert read_ended_attempts(tmp_path) == [first]


def noted(attempt: AttemptEnded) -> dict:
    return {name: getattr(attempt, name) for name in AttemptStarted.model_fields}


@pytest.mark.parametrize(
    ("job", "restarts", "requeued"),
    [("4711", "1", True), ("4711", "0", False), ("4711", "", False), ("12", "1", False), ("", "1", False)],
)
def test_a_job_is_requeued_that_began_the_run_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, job: str, restarts: str, requeued: bool
) -> None:
    add_attempt(tmp_path, attempt(1))
    add_attempt(tmp_path, attempt(1).model_copy(update={"job": ""}))
    for name, value in (("SLURM_JOB_ID", job), ("SLURM_RESTART_COUNT", restarts)):
        monkeypatch.setenv(name, value)
        if not value:
            monkeypatch.delenv(name)
    assert is_requeued(tmp_path) is requeued


DAMAGE = [b'{"began": 1.0, "ended"', b"\x00\xff\n", b"[1]\n", b"\n", b'{"began": 1.0}\n']


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_line_costs_itself_alone(tmp_path: Path, damage: bytes) -> None:
    add_attempt(tmp_path, attempt(1))
    with (tmp_path / ATTEMPTS_FILE).open("ab") as file:
        file.write(damage)
    add_attempt(tmp_path, attempt(2))
    assert [one.exit_code for one in read_ended_attempts(tmp_path)] == [1, 2]


def test_no_file_is_no_attempt(tmp_path: Path) -> None:
    assert read_ended_attempts(tmp_path / "nowhere") == []
    (tmp_path / ATTEMPTS_FILE).mkdir()
    assert read_ended_attempts(tmp_path) == []


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / ATTEMPTS_FILE)
    assert read_ended_attempts(tmp_path) == []


def test_a_full_disk_is_an_oserror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ATTEMPTS_FILE).symlink_to("/dev/full")
    monkeypatch.setattr(stat, "S_ISREG", lambda mode: True)  # else it would not even be opened
    with pytest.raises(OSError) as caught:
        add_attempt(tmp_path, attempt(1))
    assert caught.value.errno == errno.ENOSPC
