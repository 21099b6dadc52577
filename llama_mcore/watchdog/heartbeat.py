"""Heartbeat of a training process, in memory that it shares with its supervisor, and its timeouts.

A process can be stuck in two ways, so there are two: the main thread writes its phase and how far it got; a
second thread writes only that Python runs, which it does not while the process is stopped or one thread holds
the interpreter's lock.
"""

import mmap
import threading
import time
import zlib
from collections import deque
from dataclasses import dataclass, replace
from statistics import median
from struct import Struct

from llama_mcore.observe.phases import Phase, PhaseListener
from llama_mcore.watchdog.config import WatchdogConfig

ALIVE_S = 0.5
"""Seconds between the beats of the second thread."""
FIRST_STEPS = 3
"""Steps after a start that compile kernels and say nothing about those to come."""
WINDOW = 50
"""Steps that the median is taken over."""

_PHASES = list(Phase)
_CHECKSUM = Struct("<I")
_READS = 100


@dataclass(frozen=True)
class HeartbeatRecord:
    """The last beat of the main thread. Times are monotonic, the same for all processes."""

    phase: Phase
    step: int
    count: int
    """Beats so far: the rank that is behind has the fewest."""
    at: float
    allowed_s: float
    """Seconds until the next beat is overdue."""

    def is_overdue(self, now: float, awake_since: float = 0.0) -> bool:
        """`awake_since`: when the processes of the job ran again, if they were suspended."""
        return now - max(self.at, awake_since) > self.allowed_s


@dataclass(frozen=True)
class Milestones:
    """Milestones of an attempt, which stay reached."""

    settled: bool = False
    """The run's folder exists and belongs to this run."""
    saved: bool = False
    """A checkpoint is on the disk."""


class Heartbeat:
    """Shared memory, made before the fork: the training process writes it, its supervisor reads it."""

    def __init__(self, start_s: float) -> None:
        """`start_s`: seconds that the start may take."""
        memory = mmap.mmap(-1, mmap.PAGESIZE)
        self._main = _Record(memory, 0, "<BqQdd")
        self._alive = _Record(memory, 64, "<d")
        self._reached = _Record(memory, 128, "<??")
        now = time.monotonic()
        self._last = HeartbeatRecord(Phase.START, 0, 0, now, start_s)
        self._last_alive = now
        self._last_reached = Milestones()
        self.write(self._last)
        self.write_alive(now)
        self.write_reached(self._last_reached)

    def write(self, beat: HeartbeatRecord) -> None:
        self._main.write(_PHASES.index(beat.phase), beat.step, beat.count, beat.at, beat.allowed_s)

    def write_alive(self, now: float) -> None:
        self._alive.write(now)

    def write_reached(self, reached: Milestones) -> None:
        self._reached.write(reached.settled, reached.saved)

    def read(self) -> HeartbeatRecord:
        values = self._main.read()
        if values:
            phase, *rest = values
            self._last = HeartbeatRecord(_PHASES[phase], *rest)
        return self._last

    def alive_at(self) -> float:
        values = self._alive.read()
        if values:
            (self._last_alive,) = values
        return self._last_alive

    def reached(self) -> Milestones:
        values = self._reached.read()
        if values:
            self._last_reached = Milestones(*values)
        return self._last_reached


class Timeouts:
    """Seconds until the next beat is overdue, by phase and by the steps of this attempt."""

    def __init__(self, config: WatchdogConfig, save_timeout_s: float) -> None:
        """`save_timeout_s`: when a save fails by itself."""
        self._config = config
        self._limits = {
            Phase.START: config.start_s,
            Phase.SETUP: config.setup_s,
            Phase.EVALUATE: config.evaluate_s,
            Phase.SAVE: save_timeout_s + config.save_s,
            Phase.END: config.end_s,
        }
        self._steps: deque[float] = deque(maxlen=WINDOW)
        self._step_began: float | None = None

    def enter(self, phase: Phase, now: float) -> float:
        """Seconds from one beat to the next in `phase`, which begins `now` (seconds, monotonic)."""
        if self._step_began is not None:
            self._steps.append(now - self._step_began)
        self._step_began = now if phase is Phase.TRAIN else None
        return self._step_s() if phase is Phase.TRAIN else self._limits[phase]

    def _step_s(self) -> float:
        if len(self._steps) < FIRST_STEPS:
            return max(self._config.first_step_s, self._config.min_step_s)
        return max(self._config.min_step_s, self._config.step_factor * median(self._steps))


class HeartbeatWriter(PhaseListener):
    """Listener to the phases of a training process that writes its heartbeat."""

    def __init__(self, heartbeat: Heartbeat, timeouts: Timeouts) -> None:
        self._heartbeat, self._timeouts = heartbeat, timeouts
        self._beat = heartbeat.read()
        self.enter(Phase.START, 0)
        threading.Thread(target=self._show_that_python_runs, name="heartbeat", daemon=True).start()

    def enter(self, phase: Phase, step: int) -> None:
        now = time.monotonic()
        allowed = self._timeouts.enter(phase, now)
        self._write(HeartbeatRecord(phase, step, self._beat.count + 1, now, allowed))

    def beat(self) -> None:
        last = self._beat
        self._write(HeartbeatRecord(last.phase, last.step, last.count + 1, time.monotonic(), last.allowed_s))

    def progress(self) -> None:
        self._write(replace(self._beat, at=time.monotonic()))

    def run_dir_ready(self) -> None:
        self._heartbeat.write_reached(replace(self._heartbeat.reached(), settled=True))

    def saved(self, step: int) -> None:
        self._heartbeat.write_reached(replace(self._heartbeat.reached(), saved=True))

    def _write(self, beat: HeartbeatRecord) -> None:
        self._beat = beat
        self._heartbeat.write(beat)

    def _show_that_python_runs(self) -> None:
        while True:
            self._heartbeat.write_alive(time.monotonic())
            time.sleep(ALIVE_S)


class _Record:
    """Numbers at a fixed place in shared memory, with a checksum, since a read may meet a write."""

    def __init__(self, memory: mmap.mmap, offset: int, layout: str) -> None:
        self._memory, self._offset, self._layout = memory, offset, Struct(layout)

    def write(self, *values: float) -> None:
        body = self._layout.pack(*values)
        data = body + _CHECKSUM.pack(zlib.crc32(body))
        self._memory[self._offset : self._offset + len(data)] = data

    def read(self) -> tuple | None:
        """The numbers; None where the writer was stopped in the middle of a write."""
        for _ in range(_READS):
            data = self._memory[self._offset : self._offset + self._layout.size + _CHECKSUM.size]
            body, checksum = data[: self._layout.size], data[self._layout.size :]
            if checksum == _CHECKSUM.pack(zlib.crc32(body)):
                return self._layout.unpack(body)
        return None
