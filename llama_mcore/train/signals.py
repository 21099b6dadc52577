"""A request to stop, from Slurm or a person: noted at once, obeyed by all ranks after a step."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopRequest:
    """Whether this process was asked to stop."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None

    def note(self, number: int, _: FrameType | None) -> None:
        """Signal handler. A second signal means now: it gets the system's own answer."""
        if self.received is not None:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.received = signal.Signals(number)


@contextmanager
def stop_signals() -> Iterator[StopRequest]:
    """Note SIGTERM, SIGUSR1 and SIGINT for as long as the context lasts. Enter it before slow imports, so
    that a signal during start-up is not lost."""
    request = StopRequest()
    previous = {number: signal.signal(number, request.note) for number in STOP_SIGNALS}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
