"""Agreement among the ranks of a job: what one of them finds, all of them act on.

A rank that leaves alone, or decides by a number that others do not have, breaks the next collective of all
the others. So whatever ranks decide goes through one of these functions.

A function that calls a collective has to be called by all ranks itself, and the last line of its docstring,
or of its class's, says so: "Collective: ...".
"""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from llama_mcore.distributed.device import Readback
from llama_mcore.distributed.groups import Groups
from llama_mcore.errors import LlamaMcoreError, OutputError, Problem

T = TypeVar("T")


def run_on_all_ranks(groups: Groups, action: Callable[[], T]) -> T:
    """Result of `action` on this rank; what a user can fix is raised on all ranks if it fails on any.

    A rank that left alone would break the others' next collective and hide its reason behind theirs.
    Collective: all ranks call it.
    """
    result, failure = None, None
    try:
        result = action()
    except LlamaMcoreError as error:
        failure = error
    if any_rank(groups, failure is not None):
        raise next(error for error in gather_on_all_ranks(groups, failure) if error)
    return cast(T, result)


def broadcast_from_rank0(groups: Groups, action: Callable[[], T]) -> T:
    """Result of `action`, which rank 0 alone runs, on all ranks; so is what a user can fix raised on all.

    For what depends on a folder: on a network file system others may see a file sooner or later.
    Collective: all ranks call it.
    """
    found = [run_on_all_ranks(groups, lambda: action() if groups.rank == 0 else None)]
    dist.broadcast_object_list(found, src=0)
    return cast(T, found[0])


def gather_on_all_ranks(groups: Groups, value: T) -> list[T]:
    """Values of all ranks, in rank order.

    Collective: all ranks call it.
    """
    gathered: list[Any] = [None] * groups.world_size
    dist.all_gather_object(gathered, value)
    return gathered


def gather_results(
    groups: Groups, action: Callable[[], T], problem_of: Callable[[Exception], Problem]
) -> list[T]:
    """Results of `action` on all ranks, in rank order; also a barrier.

    Raises OutputError on all ranks with what failed on any, whatever it was: for threads and disks, which may
    fail in any way, and whose failure is no reason to leave the others waiting.
    Collective: all ranks call it.
    """
    result, problem, cause = None, None, None
    try:
        result = action()
    except Exception as error:
        problem, cause = problem_of(error), error
    gathered = gather_on_all_ranks(groups, (result, problem))
    if problems := [problem for _, problem in gathered if problem]:
        raise OutputError(problems) from cause
    return [cast(T, result) for result, _ in gathered]


def any_rank(groups: Groups, flag: bool) -> bool:
    """True on all ranks if the flag is set on any.

    Collective: all ranks call it.
    """
    flags = torch.tensor(int(flag), device=groups.device)
    dist.all_reduce(flags, dist.ReduceOp.MAX)
    return bool(flags.item())


def begin_sum(values: Tensor) -> Readback:
    """Sum of a tensor over all ranks, on its way to the host: neither the host nor the device waits for it.

    Collective: all ranks call it.
    """
    work = dist.all_reduce(values, async_op=True)
    assert work is not None
    return Readback(values, work.wait)
