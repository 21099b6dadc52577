"""Computations on every rank of a tensor-parallel job: each module's `cases(groups)`, by name."""

import os
from collections.abc import Callable, Iterator
from typing import Any

from llama_mcore.distributed.config import ParallelConfig
from llama_mcore.distributed.groups import Groups, process_groups

Cases = Callable[[Groups], Iterator[tuple[str, Callable[[], Any]]]]


def answers(cases: Cases) -> dict[str, Any]:
    """Findings of this rank in each case, all ranks of the job being one tensor-parallel group."""
    with process_groups(ParallelConfig(tp=int(os.environ["WORLD_SIZE"])), seed=0) as groups:
        return {name: case() for name, case in cases(groups)}
