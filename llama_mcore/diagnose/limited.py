"""Looks that may never come back, as at a file system that does not answer."""

from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import Future, wait
from threading import Thread
from typing import TypeVar

LIMIT_S = 25.0
"""Two in a row leave time before ranks that wait are given up."""

T = TypeVar("T")
Name = TypeVar("Name", bound=Hashable)


def within(limit_s: float, looks: Mapping[Name, Callable[[], T]]) -> dict[Name, T]:
    """What came of the looks, side by side; without those that did not end in `limit_s` seconds. Their
    threads are left alone, and end with the process. Raises what one of the others raised."""
    found: dict[Name, Future[T]] = {name: Future() for name in looks}
    for name, look in looks.items():
        Thread(target=_settle, args=(found[name], look), daemon=True).start()
    wait(found.values(), limit_s)
    return {name: future.result() for name, future in found.items() if future.done()}


def _settle(future: Future[T], look: Callable[[], T]) -> None:
    try:
        future.set_result(look())
    except BaseException as error:  # for the thread that waits
        future.set_exception(error)
