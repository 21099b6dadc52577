"""llama_mcore.watchdog.heartbeat: beats that another process reads, and timeouts after which they are
overdue."""

import mmap
import os
import time
from dataclasses import replace

import pytest

from llama_mcore.observe.phases import Phase
from llama_mcore.watchdog.config import WatchdogConfig
from llama_mcore.watchdog.heartbeat import (
    ALIVE_S,
    FIRST_STEPS,
    Heartbeat,
    HeartbeatRecord,
    HeartbeatWriter,
    Timeouts,
)

CONFIG = WatchdogConfig(
    step_factor=4, min_step_s=10, first_step_s=50, start_s=1, setup_s=2, save_s=3, evaluate_s=4, end_s=5
)


@pytest.mark.process
def test_another_process_reads_what_was_written() -> None:
    heartbeat = Heartbeat(start_s=7)
    assert heartbeat.read().phase is Phase.START
    beat = HeartbeatRecord(Phase.SAVE, 12, 345, 6.5, 30.25)
    child = os.fork()
    if child == 0:
        heartbeat.write(beat)
        heartbeat.write_alive(8.5)
        os._exit(0)
    os.waitpid(child, 0)
    assert heartbeat.read() == beat
    assert heartbeat.alive_at() == 8.5


def test_half_a_write_gives_the_last_whole_one(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = mmap.mmap(-1, mmap.PAGESIZE)
    monkeypatch.setattr(mmap, "mmap", lambda *_: memory)
    heartbeat = Heartbeat(start_s=7)
    before = heartbeat.read()
    whole = memory[:]
    heartbeat.write(HeartbeatRecord(Phase.SAVE, 12, 345, 6.5, 30.25))
    after = memory[:]
    differing = [place for place in range(len(whole)) if whole[place] != after[place]]
    middle = differing[len(differing) // 2]
    memory[:] = after[:middle] + whole[middle:]
    reader = heartbeat.read()
    assert reader == before
    memory[:] = after
    assert heartbeat.read().count == 345


def test_beats_are_counted_and_timed() -> None:
    heartbeat = Heartbeat(start_s=7)
    pulse = HeartbeatWriter(heartbeat, Timeouts(CONFIG, save_timeout_s=100))
    started = heartbeat.read()
    assert (started.phase, started.allowed_s) == (Phase.START, 1)
    before = time.monotonic()
    pulse.enter(Phase.SAVE, 3)
    pulse.beat()
    beat = heartbeat.read()
    assert (beat.phase, beat.step, beat.count, beat.allowed_s) == (Phase.SAVE, 3, started.count + 2, 103)
    assert before <= beat.at <= time.monotonic()


def test_who_works_on_is_not_overdue_and_no_further(monkeypatch: pytest.MonkeyPatch) -> None:
    heartbeat = Heartbeat(start_s=7)
    pulse = HeartbeatWriter(heartbeat, Timeouts(CONFIG, save_timeout_s=100))
    pulse.enter(Phase.SAVE, 3)
    before = heartbeat.read()
    monkeypatch.setattr(time, "monotonic", lambda: before.at + 100)
    pulse.progress()
    assert heartbeat.read() == replace(before, at=before.at + 100)


def test_a_thread_shows_that_python_runs() -> None:
    heartbeat = Heartbeat(start_s=7)
    made = heartbeat.alive_at()
    HeartbeatWriter(heartbeat, Timeouts(CONFIG, save_timeout_s=100))
    until = time.monotonic() + 60
    first = heartbeat.alive_at()
    while heartbeat.alive_at() - first < ALIVE_S and time.monotonic() < until:
        time.sleep(0.01)
    assert heartbeat.alive_at() - made >= ALIVE_S


@pytest.mark.parametrize(("now", "overdue"), [(109.9, False), (110.1, True)])
def test_a_beat_is_overdue_after_what_is_allowed(now: float, overdue: bool) -> None:
    assert HeartbeatRecord(Phase.TRAIN, 1, 1, 100.0, 10.0).is_overdue(now) is overdue


@pytest.mark.parametrize(
    ("phase", "allowed"),
    [
        (Phase.START, 1),
        (Phase.SETUP, 2),
        (Phase.SAVE, 103),
        (Phase.EVALUATE, 4),
        (Phase.END, 5),
        (Phase.TRAIN, 50),
    ],
)
def test_timeouts_of_each_phase(phase: Phase, allowed: float) -> None:
    assert Timeouts(CONFIG, save_timeout_s=100).enter(phase, 0.0) == allowed


def steps_of(patience: Timeouts, durations: list[float]) -> float:
    """Timeout of the step after these, each of which is followed by a save of 1,000 s that does not count."""
    now = 0.0
    for seconds in durations:
        patience.enter(Phase.TRAIN, now)
        patience.enter(Phase.SAVE, now + seconds)
        now += seconds + 1000
    return patience.enter(Phase.TRAIN, now)


def test_timeouts_of_steps_are_a_multiple_of_their_median() -> None:
    durations = [90.0, 5.0, 6.0, 7.0, 5.0]  # median 6
    assert steps_of(Timeouts(CONFIG, save_timeout_s=100), durations) == 4 * 6


def test_timeouts_of_first_steps_are_long_and_none_is_below_the_least() -> None:
    assert steps_of(Timeouts(CONFIG, 100), [1.0] * (FIRST_STEPS - 1)) == 50
    assert steps_of(Timeouts(CONFIG, 100), [1.0] * FIRST_STEPS) == 10


def test_timeouts_follow_recent_steps_alone() -> None:
    assert steps_of(Timeouts(CONFIG, 100), [100.0] * 60 + [5.0] * 50) == 20
