"""llama_mcore.distributed.mpu: exactly what DeepSpeed asks, answered from our groups."""

from typing import Any

import pytest
import torch.distributed as dist

from llama_mcore.distributed.config import ParallelConfig
from llama_mcore.distributed.groups import process_groups
from llama_mcore.distributed.mpu import Mpu
from tests.support.world import run_ranks

METHODS = {
    "get_model_parallel_world_size",
    "get_model_parallel_rank",
    "get_model_parallel_group",
    "get_tensor_model_parallel_world_size",
    "get_tensor_model_parallel_rank",
    "get_tensor_model_parallel_group",
    "get_pipeline_model_parallel_world_size",
    "get_pipeline_model_parallel_rank",
    "get_data_parallel_world_size",
    "get_data_parallel_rank",
    "get_data_parallel_group",
    "get_data_parallel_group_ranks",
}


def test_there_is_nothing_else_for_deepspeed_to_find() -> None:
    """Above all no `initialize_sequence_parallel`, at the sight of which DeepSpeed drops the groups."""
    assert {name for name in dir(Mpu) if not name.startswith("_")} == METHODS


@pytest.mark.process
def test_answers_at_tp_2_and_dp_2_and_nothing_is_forwarded_to_the_groups() -> None:
    for number, rank in enumerate(run_ranks(4, asked)):
        tp_rank, dp_rank = number % 2, number // 2
        assert rank["answers"] == {
            "get_model_parallel_world_size": 2,
            "get_model_parallel_rank": tp_rank,
            "get_tensor_model_parallel_world_size": 2,
            "get_tensor_model_parallel_rank": tp_rank,
            "get_pipeline_model_parallel_world_size": 1,
            "get_pipeline_model_parallel_rank": 0,
            "get_data_parallel_world_size": 2,
            "get_data_parallel_rank": dp_rank,
        }
        tensor_group = [number - tp_rank, number - tp_rank + 1]
        assert rank["model_group"] == rank["tensor_group"] == tensor_group
        assert rank["data_group"] == rank["data_group_ranks"] == [tp_rank, tp_rank + 2]
        assert rank["forwarded"] == []


def asked() -> dict[str, Any]:
    with process_groups(ParallelConfig(tp=2), seed=1) as groups:
        mpu = Mpu(groups)
        return {
            "forwarded": [name for name in vars(groups) if hasattr(mpu, name)],
            "answers": {
                name: getattr(mpu, name)() for name in METHODS if not name.endswith(("_group", "_ranks"))
            },
            "model_group": dist.get_process_group_ranks(mpu.get_model_parallel_group()),
            "tensor_group": dist.get_process_group_ranks(mpu.get_tensor_model_parallel_group()),
            "data_group": dist.get_process_group_ranks(mpu.get_data_parallel_group()),
            "data_group_ranks": mpu.get_data_parallel_group_ranks(),
        }
