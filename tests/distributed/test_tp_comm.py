"""llama_mcore.distributed.tp_comm: collectives beside computation give what plain sums and joins give."""

import pytest
import torch
from torch import Tensor

from llama_mcore.distributed.config import ParallelConfig
from llama_mcore.distributed.groups import process_groups
from llama_mcore.distributed.tp_comm import TensorParallel
from tests.support.world import run_ranks

pytestmark = pytest.mark.process


@pytest.mark.parametrize("size", [2, 4])
def test_results_are_the_plain_ones(size: int) -> None:
    """Equal results, with and without sequence parallelism."""
    assert run_ranks(size, wrong_collectives, size) == [[]] * size


def wrong_collectives(size: int) -> list[str]:
    """Names of those whose result is not the plain one."""
    with process_groups(ParallelConfig(tp=size), seed=1) as groups:
        rank, wrong = groups.rank, []
        # Whole numbers: sums are exact in any order.
        whole = torch.arange(8 * 3 * 2.0).view(8, 3, 2)  # [s, b, h]
        mine = slice(rank * 8 // size, (rank + 1) * 8 // size)
        total = whole * size + sum(range(size))
        expected: dict[bool, tuple[Tensor, Tensor, Tensor]] = {
            True: (whole, total[mine], total),
            False: (whole[mine], total, whole + rank),
        }
        for sequence_parallel, (gathered, reduced, replicated) in expected.items():
            tp = TensorParallel(groups.tp_group, sequence_parallel)
            results = {
                "gather": (tp.start_gather(whole[mine].clone()), gathered),
                "reduce": (tp.start_reduce(whole + rank), reduced),
                "replicated_sum": (tp.start_replicated_sum(whole + rank), replicated),
                "sum of heads": (tp.start_replicated_sum(whole + rank, always=True), total),
            }
            wrong += [
                f"{name}, sequence_parallel={sequence_parallel}"
                for name, (pending, right) in results.items()
                if not torch.equal(pending.wait(), right)
            ]
    return wrong
