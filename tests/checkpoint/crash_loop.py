"""A run that is killed again and again, and started anew by the same command until it has finished."""

import random
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from signal import SIGKILL, SIGSTOP, SIGTERM, SIGUSR1
from typing import Protocol

import psutil

from tests.support.product import TORCHRUN, Finished, finish, metrics, run_command, start
from tests.support.world import Call, exit_codes_of

RANKS = 2
LIMIT_S = 300.0
MOST_STEPS = 4
"""New steps that an attempt is given at most before it is killed."""
STOPPED_S = 0.3
LAUNCHER = "launcher"


@dataclass(frozen=True)
class Fault:
    signals: list[int]
    target: str
    """launcher, or the number of a rank."""

    @property
    def name(self) -> str:
        return " then ".join(signal.Signals(number).name for number in self.signals)


class Attempt(Protocol):
    launcher: psutil.Process
    passes_signals_on: bool
    """From the launcher to the ranks."""

    def is_over(self) -> bool: ...

    def wait(self) -> Finished: ...


class Forked:
    """Spares the start of interpreters."""

    passes_signals_on = False

    def __init__(self, settings: list[str]) -> None:
        self._call = Call(exit_codes_of, RANKS, run_command, ["train", "--config", "tiny", *settings])
        self.launcher = psutil.Process(self._call.pid)

    def is_over(self) -> bool:
        return not self._call.is_alive()

    def wait(self) -> Finished:
        try:
            return Finished(self._call.result(), self._call.output)
        except AssertionError as error:  # what has forked the ranks was killed
            return Finished([-SIGKILL], str(error))


class Launched:
    """An attempt that is started by the command of a user."""

    passes_signals_on = True

    def __init__(self, settings: list[str]) -> None:
        self._process = start(settings, ranks=RANKS, launcher=(*TORCHRUN, "--standalone"))
        self.launcher = psutil.Process(self._process.pid)

    def is_over(self) -> bool:
        return self._process.poll() is not None

    def wait(self) -> Finished:
        return finish(self._process)


def run_to_the_end(begin: Callable[[], Attempt], run_dir: Path, kills: int) -> list[Fault]:
    """Break so many attempts at random moments, then let one finish.

    An attempt that is done before it can be broken is the last one: a machine may be slow to send a signal.
    """
    dice, faults = random.Random(0), []
    for _ in range(kills):
        attempt = begin()
        wait_for_a_moment(attempt, run_dir, dice)
        faults += break_it(attempt, dice)
        if not any(attempt.wait().exit_codes):
            return faults
    finished = begin().wait()
    assert not any(finished.exit_codes), finished.output
    return faults


def wait_for_a_moment(attempt: Attempt, run_dir: Path, dice: random.Random) -> None:
    """A few steps later, or one in five times while it starts."""
    if dice.random() < 0.2:
        time.sleep(dice.uniform(0, 1.5))
        return
    steps, until = len(metrics(run_dir)) + dice.randint(1, MOST_STEPS), time.monotonic() + LIMIT_S
    while len(metrics(run_dir)) < steps and not attempt.is_over():
        assert time.monotonic() < until, f"no step {steps}"
        time.sleep(0.005)
    time.sleep(dice.uniform(0, 0.05))


def break_it(attempt: Attempt, dice: random.Random) -> list[Fault]:
    """Signal one rank or the launcher; of a launcher that is gone nothing may stay at work. Nothing, where
    the attempt is over."""
    target = dice.choice([LAUNCHER, *map(str, range(RANKS))])
    chosen = dice.choice([[SIGKILL], [SIGTERM], [SIGUSR1], [SIGSTOP, SIGKILL]])
    if target == LAUNCHER and not attempt.passes_signals_on:
        chosen = [SIGKILL]
    try:
        ranks = ranks_of(attempt)
        victim = attempt.launcher if target == LAUNCHER else ranks[int(target)]
        for number in chosen:
            victim.send_signal(number)
            if number == SIGSTOP:
                time.sleep(STOPPED_S)
    except psutil.NoSuchProcess:
        return []
    if target == LAUNCHER and SIGKILL in chosen:  # as a scheduler does
        time.sleep(dice.uniform(0, 0.2))
        for rank in ranks:
            with suppress(psutil.NoSuchProcess):
                rank.kill()
        wait_until_dead(ranks)
    return [Fault([int(number) for number in chosen], target)]


def ranks_of(attempt: Attempt) -> list[psutil.Process]:
    until = time.monotonic() + LIMIT_S
    while len(ranks := attempt.launcher.children()) < RANKS and not attempt.is_over():
        assert time.monotonic() < until, "the ranks were not started"
        time.sleep(0.01)
    if len(ranks) < RANKS:
        raise psutil.NoSuchProcess(attempt.launcher.pid)
    return ranks


def wait_until_dead(processes: list[psutil.Process]) -> None:
    until = time.monotonic() + LIMIT_S
    while any(map(is_alive, processes)):
        assert time.monotonic() < until, "SIGKILL ends no process"
        time.sleep(0.01)


def is_alive(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return process.status() != psutil.STATUS_ZOMBIE
    return False
