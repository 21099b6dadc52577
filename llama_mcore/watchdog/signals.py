"""Stop requests, from Slurm or a person: noted at once, obeyed by all ranks after a step."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from llama_mcore.errors import EXIT_SAVED

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
ECHO_S = 3.0
"""Slurm signals every process of a step, and launchers pass their signals on: one that comes so soon after
the first is the same request."""


class StoppedEarly(Exception):
    """All ranks were asked to stop before the first step: there is nothing to save."""

    exit_code = EXIT_SAVED


class StopRequest:
    """A request to this process to stop, once it has come."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._since = 0.0

    def note(self, number: int, _: FrameType | None) -> None:
        """Signal handler. A second request means "now" and gets the signal's default action."""
        if self.received is None:
            self.received, self._since = signal.Signals(number), time.monotonic()
        elif time.monotonic() - self._since > ECHO_S:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)


@contextmanager
def held_stop_signals() -> Iterator[None]:
    """Hold stop signals back while the context lasts: they are not lost, and kill no process.

    Those still pending at the end are dropped, since the process is about to exit with a code of its own.
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
    """Note SIGTERM, SIGUSR1 and SIGINT while the context lasts, including those held before it. Enter it
    before slow imports, so that a signal during start-up is not lost."""
    request = StopRequest()
    previous = {number: signal.signal(number, request.note) for number in STOP_SIGNALS}
    mask = signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    try:
        yield request
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in previous.items():
            signal.signal(number, handler)
