"""The processes that torchrun has started here, seen from a thread beside it."""

import signal
import time
from contextlib import suppress

import psutil

WORKERS_END_S = 30.0
"""As long as torchrun itself waits before it kills."""
_POLL_S = 0.1


def workers() -> list[psutil.Process]:
    """Those that have not ended. (Torchrun waits for their exit codes: nothing here may do so.)"""
    found = []
    for worker in psutil.Process().children():
        with suppress(psutil.NoSuchProcess):
            if worker.status() != psutil.STATUS_ZOMBIE:
                found.append(worker)
    return found


def send(number: int) -> None:
    for worker in workers():
        with suppress(psutil.NoSuchProcess):
            worker.send_signal(number)


def end_workers(number: int) -> None:
    """Send a signal, and SIGKILL to those that have not ended by it in time."""
    send(number)
    until = time.monotonic() + WORKERS_END_S
    while workers():
        if time.monotonic() > until:
            send(signal.SIGKILL)
            return
        time.sleep(_POLL_S)
