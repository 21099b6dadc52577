"""llama_mcore.parallel.groups: the timeout that is asked for reaches every group."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from llama_mcore.parallel.config import ParallelConfig
from llama_mcore.parallel.groups import process_groups

ASKED = timedelta(minutes=61)


def test_tensor_and_data_parallel_groups_get_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with process_groups(ParallelConfig(), 0, ASKED) as groups:
        assert [_timeout(group) for group in (groups.tp_group, groups.dp_group)] == [ASKED, ASKED]


def _timeout(group: dist.ProcessGroup) -> timedelta:
    return group._get_backend(torch.device("cpu")).options._timeout
