"""A phase of a save: every rank does its part, in the background where that takes long, and all learn how it
went."""

from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from threading import Thread
from typing import TypeVar

import torch.distributed as dist

from llama_mcore.errors import OutputError, Problem

T = TypeVar("T")


def in_background(work: Callable[[], T]) -> Future[T]:
    """Run `work` in a thread of its own.

    Python waits for the threads of an executor when it exits, and would wait for ever for a disk that hangs;
    not for this one.
    """
    future: Future[T] = Future()

    def carry_out() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    Thread(target=carry_out, name="checkpoint-writer", daemon=True).start()
    return future


def agree(action: Callable[[], T], path: Path) -> list[T]:
    """Run `action` on every rank and return what each gave; also the barrier between the phases of a save.

    Raises OutputError on all ranks with what failed on any, whatever it was: a rank that left alone would
    leave the others waiting for it.
    """
    result, problem, cause = None, None, None
    try:
        result = action()
    except Exception as error:
        problem, cause = _problem(error, path), error
    gathered: list[tuple] = [()] * dist.get_world_size()
    dist.all_gather_object(gathered, (result, problem))
    problems = [problem for _, problem in gathered if problem]
    if problems:
        raise OutputError(problems) from cause
    return [result for result, _ in gathered]


def _problem(error: Exception, path: Path) -> Problem:
    rank = f"rank {dist.get_rank()}"
    if not isinstance(error, OSError):
        return Problem("checkpoint", path, f"{rank}: {type(error).__name__}: {error}")
    remedy = "free space or change run.dir" if error.errno else ""
    return Problem("checkpoint", path, f"{rank}: {error.strerror or error}", remedy)
