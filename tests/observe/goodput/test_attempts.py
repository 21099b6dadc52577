"""llama_mcore.observe.goodput.attempts: what is added is read back, whatever a kill or a full disk left
between."""

import errno
import os
import stat
from pathlib import Path

import pytest

from llama_mcore.observe.goodput.attempts import (
    LIVES_FILE,
    EndedLife,
    NotedLife,
    add_life,
    is_requeued,
    read_ended_lives,
    read_noted_lives,
)


def life(exit_code: int, began: float = 1763920000.123) -> EndedLife:
    facts = {"job": "4711", "host": "n1", "ranks": 2, "asked": False, "saved": True, "step": 7}
    return EndedLife(began=began, ended=began + 1.5, exit_code=exit_code, **facts)


def test_what_is_added_is_read_back_in_order(tmp_path: Path) -> None:
    run_dir = tmp_path / "not/there"
    lives = [life(137), life(0, began=1.1e9 + 0.1)]
    for one in lives:
        add_life(run_dir, one)
    assert read_ended_lives(run_dir) == lives


def test_the_last_line_of_a_life_stands_at_the_place_of_its_first(tmp_path: Path) -> None:
    first, second = life(1, began=1.0), life(0, began=2.0)
    for one in (NotedLife(**noted(first)), NotedLife(**noted(second) | {"saved": False}), first):
        add_life(tmp_path, one)
    assert read_noted_lives(tmp_path) == [first, NotedLife(**noted(second) | {"saved": False})]
    assert read_ended_lives(tmp_path) == [first]


def noted(life: EndedLife) -> dict:
    return {name: getattr(life, name) for name in NotedLife.model_fields}


@pytest.mark.parametrize(
    ("job", "restarts", "requeued"),
    [("4711", "1", True), ("4711", "0", False), ("4711", "", False), ("12", "1", False), ("", "1", False)],
)
def test_a_job_is_requeued_that_began_the_run_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, job: str, restarts: str, requeued: bool
) -> None:
    add_life(tmp_path, life(1))
    add_life(tmp_path, life(1).model_copy(update={"job": ""}))
    for name, value in (("SLURM_JOB_ID", job), ("SLURM_RESTART_COUNT", restarts)):
        monkeypatch.setenv(name, value)
        if not value:
            monkeypatch.delenv(name)
    assert is_requeued(tmp_path) is requeued


DAMAGE = [b'{"began": 1.0, "ended"', b"\x00\xff\n", b"[1]\n", b"\n", b'{"began": 1.0}\n']


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_line_costs_itself_alone(tmp_path: Path, damage: bytes) -> None:
    add_life(tmp_path, life(1))
    with (tmp_path / LIVES_FILE).open("ab") as file:
        file.write(damage)
    add_life(tmp_path, life(2))
    assert [one.exit_code for one in read_ended_lives(tmp_path)] == [1, 2]


def test_no_file_is_no_life(tmp_path: Path) -> None:
    assert read_ended_lives(tmp_path / "nowhere") == []
    (tmp_path / LIVES_FILE).mkdir()
    assert read_ended_lives(tmp_path) == []


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / LIVES_FILE)
    assert read_ended_lives(tmp_path) == []


def test_a_full_disk_is_an_oserror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / LIVES_FILE).symlink_to("/dev/full")
    monkeypatch.setattr(stat, "S_ISREG", lambda mode: True)  # else it would not even be opened
    with pytest.raises(OSError) as caught:
        add_life(tmp_path, life(1))
    assert caught.value.errno == errno.ENOSPC
