"""A run is written by one job at a time, and a job that lost it does not publish."""

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import psutil
import pytest

from llama_mcore.checkpoint import run_lock
from llama_mcore.checkpoint.run_lock import FOLDER, STALE_S, check_free, held_lease, was_taken_over
from llama_mcore.errors import PreflightError
from llama_mcore.observe.metrics_file import METRICS_FILE
from tests.support.errors import refused

HOLD = """
import sys, time
from pathlib import Path
from llama_mcore.checkpoint.run_lock import held_lease
with held_lease(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""
ELSEWHERE = "process 1 on elsewhere"


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run folder with something in it, so that it stays."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").touch()
    return tmp_path / "run"


def names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / FOLDER).iterdir())


def written_by(run_dir: Path, number: int, **fields: object) -> Path:
    """A lease as another process leaves it."""
    holder = {"host": "elsewhere", "pid": 1, "boot": "b", "namespace": "n", "ticks": 0, "job": ""}
    (run_dir / FOLDER).mkdir(exist_ok=True)
    path = run_dir / FOLDER / f"{number:08d}.json"
    path.write_text(json.dumps(holder | fields))
    return path


@contextmanager
def in_use_by(run_dir: Path, holder: str) -> Iterator[None]:
    """The block must be refused, with who holds the run."""
    with refused(PreflightError, "run.dir", run_dir) as caught:
        yield
    assert holder in str(caught.value)


def test_lease_numbers_grow_from_attempt_to_attempt(run_dir: Path) -> None:
    for attempt in (1, 2, 3):
        with held_lease(run_dir) as held:
            held.check()
            assert held.number == attempt
    assert names(run_dir) == [f"0000000{attempt}.released.json" for attempt in (1, 2, 3)]


def test_a_folder_that_held_nothing_but_the_lease_is_removed(tmp_path: Path) -> None:
    with held_lease(tmp_path / "a/b"):
        assert names(tmp_path / "a/b") == ["00000001.json"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.process
def test_a_second_job_gets_no_lease_while_the_first_lives(run_dir: Path) -> None:
    first = subprocess.Popen([sys.executable, "-c", HOLD, str(run_dir)], stdout=subprocess.PIPE, text=True)
    assert first.stdout is not None
    assert first.stdout.readline() == "held\n"
    with in_use_by(run_dir, f"process {first.pid} on {socket.gethostname()}"), held_lease(run_dir):
        pass
    assert names(run_dir) == ["00000001.json"]
    first.kill()
    first.wait()
    with held_lease(run_dir) as held:  # dead: taken over at once
        assert held.number == 2


def test_another_process_with_the_same_pid_is_not_the_holder_of_a_lease(run_dir: Path) -> None:
    written_by(run_dir, 1, **(me() | {"ticks": 12}))
    with held_lease(run_dir) as held:
        assert held.number == 2


def me() -> dict[str, object]:
    return asdict(run_lock._myself())


@pytest.mark.parametrize("off_s", [-86400.0, 2.0, 86400.0])
def test_a_changed_clock_makes_no_holder_of_a_lease_dead(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, off_s: float
) -> None:
    """Start times since 1970 move with the clock, ticks since the boot do not. The lock is left out."""
    written_by(run_dir, 1, **me())
    monkeypatch.setattr(run_lock, "_is_locked", lambda path: False)
    monkeypatch.setattr(run_lock, "time", Clock(off_s))
    monkeypatch.setattr(psutil, "boot_time", lambda: 1e9 + off_s)
    with in_use_by(run_dir, f"process {os.getpid()}"), held_lease(run_dir):
        pass


@pytest.mark.parametrize("other", [{"namespace": "pid:[1]"}, {"boot": "another"}])
def test_a_touched_lease_counts_where_its_process_cannot_be_seen(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, other: dict[str, str]
) -> None:
    """A container, or another machine, under the same host name: our process of that number is not theirs."""
    path = written_by(run_dir, 1, **(me() | other | {"pid": 999_999_999}))
    clock = Clock(act=lambda: os.utime(path, (1, time.time() + 1)))
    monkeypatch.setattr(run_lock, "time", clock)
    with in_use_by(run_dir, "process 999999999"), held_lease(run_dir):
        pass


def test_a_held_lock_decides_whose_the_lease_is(run_dir: Path) -> None:
    path = written_by(run_dir, 1)
    os.utime(path, (1, 1))  # silent for ages
    with path.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with in_use_by(run_dir, ELSEWHERE), held_lease(run_dir):
            pass
        with in_use_by(run_dir, ELSEWHERE):
            check_free(run_dir)
    with held_lease(run_dir) as held:
        assert held.number == 2


@pytest.mark.process
def test_a_stopped_holder_of_a_lease_is_alive(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = subprocess.Popen([sys.executable, "-c", HOLD, str(run_dir)], stdout=subprocess.PIPE, text=True)
    assert first.stdout is not None
    assert first.stdout.readline() == "held\n"
    first.send_signal(signal.SIGSTOP)
    path = run_dir / FOLDER / "00000001.json"
    holder = json.loads(path.read_text())
    path.write_text(json.dumps(holder | {"namespace": "pid:[1]"}))  # seen from a container
    os.utime(path, (1, 1))
    try:
        with in_use_by(run_dir, f"process {first.pid}"), held_lease(run_dir):
            pass
    finally:
        first.kill()
        first.wait()


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
def test_a_lease_that_is_not_a_file_is_nobodys(run_dir: Path, make: Callable[[Path], object]) -> None:
    (run_dir / FOLDER).mkdir()
    make(run_dir / FOLDER / "00000001.json")
    with held_lease(run_dir) as held:
        assert held.number == 2


def test_a_name_without_a_number_is_not_a_lease(run_dir: Path) -> None:
    (run_dir / FOLDER).mkdir()
    (run_dir / FOLDER / "1\N{SUPERSCRIPT TWO}345678.json").touch()
    with held_lease(run_dir) as held:
        assert held.number == 1


class Clock:
    """A clock in place of `time` in run_lock.py: it may be off, and nobody waits. `act` is called before each
    wait."""

    def __init__(self, off_s: float = 0.0, act: Callable[[], object] = lambda: None) -> None:
        self.waited, self._off_s, self._act = 0.0, off_s, act

    def time(self) -> float:
        return time.time() + self.waited + self._off_s

    def monotonic(self) -> float:
        return self.waited

    def sleep(self, seconds: float) -> None:
        self._act()
        self.waited += seconds


@pytest.mark.parametrize("off_s", [-7200.0, 0.0, 7200.0])
@pytest.mark.parametrize(("untouched_s", "waits_s"), [(0, 60), (40, 20), (3600, 0), (-3600, 60)])
def test_the_age_of_a_lease_is_read_from_one_clock(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, off_s: float, untouched_s: float, waits_s: float
) -> None:
    clock = Clock(off_s)
    monkeypatch.setattr(run_lock, "time", clock)
    touched = time.time() - untouched_s
    os.utime(written_by(run_dir, 1), (touched, touched))
    with held_lease(run_dir) as held:
        assert held.number == 2
    # the time that the machine itself lets pass counts as silence too
    assert waits_s - (time.time() - touched - untouched_s) - 1.5 < clock.waited < waits_s + 1.5
    assert names(run_dir) == ["00000001.json", "00000002.released.json"]


def test_a_holder_that_touches_its_lease_is_alive(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written_by(run_dir, 7)
    clock = Clock(act=lambda: os.utime(path, (1, time.time() + 1)))
    monkeypatch.setattr(run_lock, "time", clock)
    with in_use_by(run_dir, ELSEWHERE), held_lease(run_dir):
        pass
    assert clock.waited < STALE_S


def test_a_requeued_job_takes_over_its_own_lease(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written_by(run_dir, 1, job="77")
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    with held_lease(run_dir) as held:
        assert held.number == 2


def test_two_starts_in_one_job_do_not_share_a_lease(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that was typed twice into a shell of salloc."""
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    with held_lease(run_dir), refused(PreflightError, "run.dir", run_dir), held_lease(run_dir):
        pass


def test_a_lease_cut_off_while_it_was_written_is_nobodys(run_dir: Path) -> None:
    written_by(run_dir, 1).write_text('{"host": "el')
    with held_lease(run_dir) as held:
        assert held.number == 2


def test_a_holder_that_lost_its_lease_may_not_publish(run_dir: Path) -> None:
    with held_lease(run_dir) as held:
        written_by(run_dir, 2, job="78")
        with pytest.raises(OSError, match=f"{ELSEWHERE}, job 78"):
            held.check()


def test_a_lease_that_a_successor_released_is_seen(run_dir: Path) -> None:
    with held_lease(run_dir) as held:
        written_by(run_dir, 2).rename(run_dir / FOLDER / "00000002.released.json")
        written_by(run_dir, 3, job="79")
        with pytest.raises(OSError, match="job 79"):
            held.check()


def test_a_failing_file_system_does_not_end_a_lease(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path, **_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    with held_lease(run_dir) as held:
        with monkeypatch.context() as patch:
            patch.setattr(Path, "stat", fail)
            with pytest.raises(OSError) as caught:
                held.check()
        assert caught.value.errno == errno.EIO
        held.check()


def test_numbers_go_on_after_leases_were_deleted(run_dir: Path) -> None:
    """Else lines of earlier attempts would pass for later ones."""
    (run_dir / METRICS_FILE).write_text('{"step": 1, "attempt": 4}\n{"step": 2, "attempt": 5}\n')
    with held_lease(run_dir) as held:
        assert held.number == 6


@pytest.mark.process
def test_a_process_knows_whether_its_lease_was_taken_over(run_dir: Path) -> None:
    first = subprocess.Popen([sys.executable, "-c", HOLD, str(run_dir)], stdout=subprocess.PIPE, text=True)
    assert first.stdout is not None
    assert not was_taken_over(run_dir, first.pid)  # nobody has had it
    assert first.stdout.readline() == "held\n"
    assert not was_taken_over(run_dir, first.pid)
    first.kill()
    first.wait()
    assert not was_taken_over(run_dir, first.pid)
    with held_lease(run_dir):
        assert was_taken_over(run_dir, first.pid)
        assert not was_taken_over(run_dir, os.getpid())
    assert was_taken_over(run_dir, first.pid)
    written_by(run_dir, 3, **(me() | {"boot": "another"}))
    assert was_taken_over(run_dir, os.getpid())


def test_only_one_of_two_takes_over_a_lease(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one creates its file between our look and ours."""
    this_host = socket.gethostname

    def asked_after_the_look() -> str:
        written_by(run_dir, 1)
        return this_host()

    monkeypatch.setattr(socket, "gethostname", asked_after_the_look)
    with in_use_by(run_dir, ELSEWHERE), held_lease(run_dir):
        pass


def test_the_file_is_touched_while_the_lease_is_held(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "BEAT_S", 0.05)
    with held_lease(run_dir) as held:
        os.utime(held.path, (1, 1))
        deadline = time.monotonic() + 60
        while held.path.stat().st_mtime == 1 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert held.path.stat().st_mtime > 1


def test_a_check_takes_no_lease_and_does_not_wait(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(run_lock, "time", clock)
    check_free(run_dir)
    assert not (run_dir / FOLDER).exists()
    path = written_by(run_dir, 1)
    with in_use_by(run_dir, ELSEWHERE):
        check_free(run_dir)
    os.utime(path, (1, time.time() - STALE_S - 1))
    check_free(run_dir)  # silent for long
    assert clock.waited == 0
    assert names(run_dir) == ["00000001.json"]
    with held_lease(run_dir), refused(PreflightError, "run.dir", run_dir):
        check_free(run_dir)
    check_free(run_dir)  # given back
