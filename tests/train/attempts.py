"""Attempts of a run, each one start of it, in which something happens at a known moment.

Ranks are forked, and as torchrun does, this ends the others when one has failed.
"""

import math
import os
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil

from llama_mcore.errors import EXIT_SAVED
from llama_mcore.observe.goodput.spans import PRODUCTIVE, read_attempts
from llama_mcore.observe.phases import Phase
from llama_mcore.watchdog.heartbeat import HeartbeatWriter
from llama_mcore.watchdog.signals import STOP_SIGNALS, StopRequest
from tests.support.product import metrics, run_command
from tests.support.world import Call, launched_as, reserved_port

SHORT = ["parallel.tp=1", "train.steps=9", "eval.interval=4", "checkpoint.interval=3"]
"""For several tests, which so compare with the same undisturbed run."""
LAST_WORDS_S = 60.0


@dataclass(frozen=True)
class Attempt:
    overrides: list[str]
    """Also flags."""
    fault: Callable[[], object] | None = None
    """A function of a module, or a partial of one."""
    phase: str = "train"
    """At whose beginning the fault happens; "data": when the step is read; "before": before all else."""
    step: int = 0
    ranks: Sequence[int] = ()
    """Those that it happens to."""
    world_size: int = 2
    missing: int = 0
    """So many ranks never come, and those that wait for them are ended."""
    job: str = ""
    """SLURM_JOB_ID."""
    restarts: int = 0
    """SLURM_RESTART_COUNT."""


@dataclass(frozen=True)
class Lived:
    codes: list[int]
    """Exit codes of the ranks; negative: by which signal."""
    first: int
    """That of the first that failed; 0 if none did."""
    left_over: list[str]
    """Processes that had not ended long after the ranks."""
    output: str


def live(attempt: Attempt) -> Lived:
    host = Call(_live, attempt)
    codes, first, left_over = host.result()
    return Lived(codes, first, left_over, host.output)


def first_steps(run_dir: Path) -> list[int]:
    """The step that each attempt of a run began to train with; 0: it did not train."""
    return [
        next((step for _, kind, step in attempt.entries if kind == PRODUCTIVE), 0)
        for attempt in read_attempts(run_dir)
    ]


def wait_for_steps(run_dir: Path, steps: int, is_alive: Callable[[], bool]) -> None:
    """Until a run has done so many steps, or has ended."""
    while len(metrics(run_dir)) < steps and is_alive():
        time.sleep(0.02)


# Faults.


def keep_the_interpreter() -> None:
    sum(range(10**14))  # one call in C, which neither lets go of the lock nor looks for signals


def read_what_never_comes() -> None:
    fifo = Path(tempfile.mkdtemp()) / "fifo"
    os.mkfifo(fifo)
    fifo.read_bytes()


def be_stopped() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def be_killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fail() -> None:
    raise RuntimeError("a fault of the test")


def ask(number: signal.Signals) -> None:
    """Send a request to stop, as a launcher does, to the process that it started, and wait until that has
    passed it on to this one, which may be killed instead."""
    os.kill(os.getppid(), number)
    while not _is_asked(number):
        time.sleep(0.01)


def _is_asked(number: signal.Signals) -> bool:
    request = getattr(signal.getsignal(number), "__self__", None)
    return isinstance(request, StopRequest) and request.received is not None


def spoil_loss() -> None:
    """The next loss that this rank computes is NaN."""
    from llama_mcore.train import step

    mean_loss = step.mean_loss

    def spoilt(*arguments: Any) -> Any:
        step.mean_loss = mean_loss
        return mean_loss(*arguments) * float("nan")

    step.mean_loss = spoilt


# In the process that forks the ranks.


def _live(attempt: Attempt) -> tuple[list[int], int, list[str]]:
    fork = get_context("fork")
    with reserved_port() as port:
        ranks = [
            fork.Process(target=_rank_main, args=(attempt, rank, port))
            for rank in range(attempt.world_size - attempt.missing)
        ]
        # As our torchrun has it: a signal kills no rank that is just starting.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        for process in ranks:
            process.start()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if attempt.missing:
            _wait_until_served(port)
            _end(ranks)
        first = _wait_for_all(ranks)
    return [process.exitcode or 0 for process in ranks], first, _left_over()


def _wait_until_served(port: int) -> None:
    """Wait until rank 0 serves the port; it then waits for the others."""
    while True:
        with suppress(OSError), socket.create_connection(("localhost", port)):
            return
        time.sleep(0.05)


def _wait_for_all(ranks: Sequence[BaseProcess]) -> int:
    """Exit code of the first that failed, upon which the others are ended. Where it was asked to stop so are
    they, and on a slow machine they may still be at it: these have time."""
    first, patient_until = 0, 0.0
    while any(process.is_alive() for process in ranks):
        failed = [process.exitcode for process in ranks if process.exitcode]
        if failed and not first:
            first = failed[0]
            patient_until = time.monotonic() + (LAST_WORDS_S if first == EXIT_SAVED else 0)
        if first and time.monotonic() > patient_until:
            _end(ranks)
            patient_until = math.inf
        time.sleep(0.02)
    return first or next((process.exitcode for process in ranks if process.exitcode), 0)


def _end(ranks: Sequence[BaseProcess]) -> None:
    for process in ranks:
        process.terminate()


def _left_over() -> list[str]:
    """Processes still at work in this session after they have had time to end."""
    until = time.monotonic() + LAST_WORDS_S
    while (others := _others_at_work()) and time.monotonic() < until:
        time.sleep(0.05)
    return others


def _others_at_work() -> list[str]:
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            is_mine = process.pid != os.getpid() and os.getsid(process.pid) == os.getpid()
            if is_mine and process.status() != psutil.STATUS_ZOMBIE:
                found.append(str(process))
    return found


def _rank_main(attempt: Attempt, rank: int, port: int) -> None:
    os.environ |= launched_as(rank, attempt.world_size, port)
    os.environ |= {"TORCHELASTIC_RESTART_COUNT": "0", "SLURM_JOB_ID": attempt.job}
    os.environ["SLURM_RESTART_COUNT"] = str(attempt.restarts)
    if attempt.fault and rank in attempt.ranks:
        _prepare(attempt.fault, attempt.phase, attempt.step)
    run_command(["train", "--config", "tiny", *attempt.overrides])


def _prepare(fault: Callable[[], object], phase: str, step: int) -> None:
    """Let the fault happen in this rank when its time comes."""
    if phase == "before":
        fault()
    elif phase == "data":
        _fail_in_read(fault, step)
    else:
        _fail_in_phase(fault, Phase(phase), step)


def _fail_in_read(fault: Callable[[], object], step: int) -> None:
    """`step`: counted from the first of this attempt; most are read while the one before is under way."""
    from llama_mcore.train.trainer import Trainer

    read, steps = Trainer._read, count(1)

    def read_or_fail(trainer: Trainer) -> Any:
        if next(steps) == step:
            fault()
        return read(trainer)

    Trainer._read = read_or_fail  # type: ignore[method-assign]


def _fail_in_phase(fault: Callable[[], object], where: Phase, at: int) -> None:
    enter = HeartbeatWriter.enter

    def entered(pulse: HeartbeatWriter, phase: Phase, step: int) -> None:
        enter(pulse, phase, step)
        if (phase, step) == (where, at):
            fault()

    HeartbeatWriter.enter = entered  # type: ignore[method-assign]
