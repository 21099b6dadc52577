"""What all ranks of a job decide together."""

from collections.abc import Callable
from typing import TypeVar, cast

import torch
import torch.distributed as dist

from llama_mcore.distributed.groups import Groups
from llama_mcore.errors import LlamaMcoreError

T = TypeVar("T")


def together(groups: Groups, action: Callable[[], T]) -> T:
    """Run `action` on every rank; if it fails on any for a reason of the user's, raise that on all.

    A rank that left alone would break the others' next collective and hide its reason behind theirs.
    """
    result, failure = None, None
    try:
        result = action()
    except LlamaMcoreError as error:
        failure = error
    if any_rank(failure is not None, groups):
        failures: list[LlamaMcoreError | None] = [None] * groups.world_size
        dist.all_gather_object(failures, failure)
        raise next(error for error in failures if error)
    return cast(T, result)


def any_rank(flag: bool, groups: Groups) -> bool:
    """Whether the flag is up on any rank; all ranks get the same answer."""
    flags = torch.tensor(int(flag), device=groups.device)
    dist.all_reduce(flags, dist.ReduceOp.MAX)
    return bool(flags.item())
