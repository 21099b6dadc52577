"""Pool of processes that each do one task at a time. They end with their parent, and one failure ends all.

Workers are spawned: forking a process that runs threads can deadlock. concurrent.futures.ProcessPoolExecutor
would not do. It gives a task to any process, whereas a compressed file is read forward only, so that a worker
must keep the file it is in. And before Python 3.14 it cannot end a process in the middle of a task: an error
or Ctrl-C would wait for every unit in progress, up to a minute each.
"""

import importlib
import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any, Generic, TypeVar

from llama_mcore.errors import LlamaMcoreError, PreflightError, Problem

Task = TypeVar("Task")
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class _Crash:
    """Traceback of an error that is not the user's."""

    text: str


class Workers(Generic[Task, Answer]):
    """`count` processes that import the module `preload` as they start; a count of 1 is this process."""

    def __init__(self, count: int, preload: str) -> None:
        self._count, self._preload = count, preload
        self._processes: list[SpawnProcess] = []
        self._connections: list[Connection] = []

    def __enter__(self) -> "Workers[Task, Answer]":
        if self._count > 1:
            try:
                self._start()
            except BaseException:
                self.__exit__()
                raise
        return self

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        resource_tracker.ensure_running()  # started later, it would unblock SIGINT
        with _sigint_blocked():
            for _ in range(self._count):
                ours, theirs = context.Pipe()
                process = context.Process(target=_work, args=(theirs, self._preload), daemon=True)
                process.start()
                theirs.close()
                self._processes.append(process)
                self._connections.append(ours)

    def __exit__(self, *error: object) -> None:
        for process in self._processes:
            process.kill()  # in the middle of a task or not
        for process, connection in zip(self._processes, self._connections, strict=True):
            process.join()
            connection.close()

    def run(
        self,
        make: Callable[[], Callable[[Task], Answer]],
        next_task: Callable[[int], Task | None],
        describe: Callable[[Task], str],
    ) -> Iterator[tuple[Task, Answer]]:
        """Yield each task with its answer, as they come.

        `make` builds in each worker the function that does the tasks; `next_task(worker)` gives a free worker
        its next one, None for nothing at the moment; `describe` names a task in an error.
        """
        self._describe = describe
        if self._count == 1:
            do = make()
            while (task := next_task(0)) is not None:
                yield task, do(task)
            return
        for connection in self._connections:
            self._send(connection, make, None)
        doing: dict[Connection, tuple[int, Task]] = {}
        while True:
            busy = {worker for worker, _ in doing.values()}
            for worker in range(self._count):
                if worker not in busy and (task := next_task(worker)) is not None:
                    connection = self._connections[worker]
                    doing[connection] = worker, task
                    self._send(connection, task, task)
            if not doing:
                return
            for ready in wait(list(doing)):
                assert isinstance(ready, Connection)
                task = doing[ready][1]
                answer = self._receive(ready, task)
                del doing[ready]
                yield task, answer

    def _send(self, connection: Connection, message: object, task: Task | None) -> None:
        try:
            connection.send(message)
        except OSError:
            raise self._killed(task) from None

    def _receive(self, connection: Connection, task: Task) -> Answer:
        try:
            answer: Any = connection.recv()
        except (EOFError, OSError):
            raise self._killed(task) from None
        if isinstance(answer, LlamaMcoreError):
            raise answer
        if isinstance(answer, _Crash):
            raise RuntimeError(f"a worker failed at {self._describe(task)}:\n{answer.text}")
        result: Answer = answer
        return result

    def _killed(self, task: Task | None) -> PreflightError:
        place = "its start" if task is None else self._describe(task)
        reason = f"a worker was killed at {place}, most likely because the machine ran out of memory"
        return PreflightError(Problem("--workers", self._count, reason, "give fewer workers"))


def _work(connection: Connection, preload: str) -> None:
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    importlib.import_module(preload)
    make: Callable[[], Callable[[Any], Any]] = connection.recv()
    do: Callable[[Any], Any] | None = None
    while True:
        task = connection.recv()
        try:
            do = do or make()
            answer: Any = do(task)
        except LlamaMcoreError as error:
            answer = error
        except Exception:
            answer = _Crash(traceback.format_exc())
        connection.send(answer)


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


@contextmanager
def _sigint_blocked() -> Iterator[None]:
    """Block SIGINT: processes started meanwhile inherit that and leave Ctrl-C to their parent."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
