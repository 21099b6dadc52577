"""A request to stop, from Slurm or a person: noted at once, obeyed by all ranks after a step."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from llama_mcore.errors import EXIT_SAVED

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
ECHO_S = 3.0
"""Slurm gives a signal to every process of a step, and launchers pass theirs on: what comes so soon after the
first is the same request."""


class StoppedEarly(Exception):
    """All ranks were asked to stop before the first step: there is nothing to save."""

    exit_code = EXIT_SAVED


class StopRequest:
    """Whether this process was asked to stop."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._since = 0.0

    def note(self, number: int, _: FrameType | None) -> None:
        """Signal handler. A second request means now: it gets the system's own answer."""
        if self.received is None:
            self.received, self._since = signal.Signals(number), time.monotonic()
        elif time.monotonic() - self._since > ECHO_S:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)


@contextmanager
def held_stop_signals() -> Iterator[None]:
    """Let the signals wait: those that come meanwhile are not lost, and kill nobody.

    What still waits at the end is dropped, since the process is about to leave with an exit code of its own.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        while signal.sigtimedwait(STOP_SIGNALS, 0):
            pass
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def stop_signals() -> Iterator[StopRequest]:
    """Note SIGTERM, SIGUSR1 and SIGINT for as long as the context lasts, those that were held before it
    included. Enter it before slow imports, so that a signal during start-up is not lost."""
    request = StopRequest()
    previous = {number: signal.signal(number, request.note) for number in STOP_SIGNALS}
    mask = signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    try:
        yield request
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in previous.items():
            signal.signal(number, handler)
