"""Waits for something that has to happen, however slow the machine is."""

import time
from collections.abc import Callable

LIMIT_S = 300.0
"""Ends what hangs."""


def wait_until(holds: Callable[[], object], goes_on: Callable[[], object] = lambda: True) -> None:
    """`goes_on`: whether what it waits for can still come."""
    until = time.monotonic() + LIMIT_S
    while True:
        may_come = goes_on()
        if holds():
            return
        assert may_come, "it ended before that"
        assert time.monotonic() < until, "it did not come to that"
        time.sleep(0.01)
