"""Work in threads that end with the process, whatever they wait for: a file system may never answer."""

from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import Future, wait
from threading import Thread
from typing import TypeVar

T = TypeVar("T")
Name = TypeVar("Name", bound=Hashable)


def in_background(work: Callable[[], T], name: str | None = None) -> Future[T]:
    """Run `work` in a daemon thread called `name`: Python waits for those of an executor when it exits."""
    future: Future[T] = Future()

    def carry_out() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # for the thread that asks for the result
            future.set_exception(error)

    Thread(target=carry_out, name=name, daemon=True).start()
    return future


def run_with_timeout(limit_s: float, checks: Mapping[Name, Callable[[], T]]) -> dict[Name, T]:
    """Results of `checks`, run side by side, without those that did not end in `limit_s` seconds. Raises what
    one of the others raised."""
    futures = {name: in_background(check) for name, check in checks.items()}
    wait(futures.values(), limit_s)
    return {name: future.result() for name, future in futures.items() if future.done()}
