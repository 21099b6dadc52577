"""llama_mcore.distributed.groups: who is whose neighbour, and the end of the groups on every path."""

from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from llama_mcore.distributed.config import ParallelConfig
from llama_mcore.distributed.groups import process_groups
from tests.support.world import run_ranks

ASKED = timedelta(minutes=61)
GONE = [False, False]  # neither torch's groups nor megatron-core's


def alive() -> list[bool]:
    return [dist.is_initialized(), parallel_state.model_parallel_is_initialized()]


@pytest.mark.process
def test_ranks_of_a_tensor_parallel_group_are_consecutive_and_groups_are_torn_down_at_the_end() -> None:
    found = run_ranks(4, in_groups_of_two)
    assert [rank["world"] for rank in found] == [[0, 4], [1, 4], [2, 4], [3, 4]]
    assert [rank["tp"] for rank in found] == [[0, 2, 0, 1], [1, 2, 0, 1], [0, 2, 2, 3], [1, 2, 2, 3]]
    assert [rank["dp"] for rank in found] == [[0, 2, 0, 2], [0, 2, 1, 3], [1, 2, 0, 2], [1, 2, 1, 3]]
    assert [rank["left"] for rank in found] == [GONE] * 4


def in_groups_of_two() -> dict[str, Any]:
    with process_groups(ParallelConfig(tp=2), seed=1) as groups:
        found = {
            "tp": [groups.tp_rank, groups.tp_size, *dist.get_process_group_ranks(groups.tp_group)],
            "dp": [groups.dp_rank, groups.dp_size, *dist.get_process_group_ranks(groups.dp_group)],
            "world": [groups.rank, groups.world_size],
        }
    return found | {"left": alive()}


@pytest.mark.process
def test_groups_are_torn_down_when_the_body_raises() -> None:
    other, raised = run_ranks(2, raising)
    assert raised == {"error": "of the body", "left": GONE}
    assert other["left"] == GONE
    assert "of the body" not in str(other["error"])


def raising() -> dict[str, Any]:
    """The body fails on rank 1 alone; neither rank may wait for the other."""
    error = None
    try:
        with process_groups(ParallelConfig(tp=2), seed=1) as groups:
            if groups.rank == 1:
                raise ValueError("of the body")
    except (ValueError, RuntimeError) as caught:
        error = str(caught)
    return {"error": error, "left": alive()}


@pytest.fixture
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("_no_launcher")
def test_one_process_needs_no_launcher() -> None:
    with process_groups(ParallelConfig(), seed=1) as groups:
        assert (groups.rank, groups.world_size, groups.tp_size, groups.dp_size) == (0, 1, 1, 1)
        assert alive() == [True, True]
    assert alive() == GONE


@pytest.mark.usefixtures("_no_launcher")
def test_tensor_and_data_parallel_groups_get_it_too() -> None:
    with process_groups(ParallelConfig(), 0, ASKED) as groups:
        assert [_timeout(group) for group in (groups.tp_group, groups.dp_group)] == [ASKED, ASKED]


def _timeout(group: dist.ProcessGroup) -> timedelta:
    """Timeout of a group, which no public API of torch shows."""
    return group._get_backend(torch.device("cpu")).options._timeout
