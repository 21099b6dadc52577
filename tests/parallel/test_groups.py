"""llama_mcore.parallel.groups: who is whose neighbour, and the end of the groups on every path."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from llama_mcore.parallel.config import ParallelConfig
from llama_mcore.parallel.groups import process_groups
from tests.parallel.conftest import Results

ASKED = timedelta(minutes=61)
GONE = [False, False]  # neither torch's groups nor megatron-core's


def test_ranks_of_a_tensor_parallel_group_are_consecutive(results: Results) -> None:
    found = results("groups", 4)
    assert [rank["world"] for rank in found] == [[0, 4], [1, 4], [2, 4], [3, 4]]
    assert [rank["tp"] for rank in found] == [[0, 2, 0, 1], [1, 2, 0, 1], [0, 2, 2, 3], [1, 2, 2, 3]]
    assert [rank["dp"] for rank in found] == [[0, 2, 0, 2], [0, 2, 1, 3], [1, 2, 0, 2], [1, 2, 1, 3]]


def test_groups_are_torn_down_at_the_end(results: Results) -> None:
    assert [rank["left"] for rank in results("groups", 4)] == [GONE] * 4


def test_groups_are_torn_down_when_the_body_raises(results: Results) -> None:
    other, raised = results("raising", 2)
    assert raised == {"error": "of the body", "left": GONE}
    assert other["left"] == GONE
    assert "of the body" not in str(other["error"])


def test_one_process_needs_no_launcher(results: Results) -> None:
    assert results("alone", 1) == [{"found": [0, 1, 1, 1], "left": GONE}]


def test_tensor_and_data_parallel_groups_get_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with process_groups(ParallelConfig(), 0, ASKED) as groups:
        assert [_timeout(group) for group in (groups.tp_group, groups.dp_group)] == [ASKED, ASKED]


def _timeout(group: dist.ProcessGroup) -> timedelta:
    return group._get_backend(torch.device("cpu")).options._timeout
