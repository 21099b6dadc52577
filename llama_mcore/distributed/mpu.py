"""Adapter through which DeepSpeed sees our model parallelism.

megatron-core's `parallel_state` cannot be passed: it lacks three of these methods, and DeepSpeed also looks
for names (an `initialize_sequence_parallel` makes it drop the groups). So the adapter has exactly the methods
that DeepSpeed 0.19.8 calls for a job without pipeline or context parallelism.
"""

import torch.distributed as dist

from llama_mcore.distributed.groups import Groups


class Mpu:
    """DeepSpeed's `mpu`. Model parallelism is tensor parallelism; ZeRO shards over data parallelism."""

    def __init__(self, groups: Groups) -> None:
        self._groups = groups

    def get_model_parallel_world_size(self) -> int:
        return self._groups.tp_size

    def get_model_parallel_rank(self) -> int:
        return self._groups.tp_rank

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self._groups.tp_group

    def get_tensor_model_parallel_world_size(self) -> int:
        return self._groups.tp_size

    def get_tensor_model_parallel_rank(self) -> int:
        return self._groups.tp_rank

    def get_tensor_model_parallel_group(self) -> dist.ProcessGroup:
        return self._groups.tp_group

    def get_pipeline_model_parallel_world_size(self) -> int:
        return 1

    def get_pipeline_model_parallel_rank(self) -> int:
        return 0

    def get_data_parallel_world_size(self) -> int:
        return self._groups.dp_size

    def get_data_parallel_rank(self) -> int:
        return self._groups.dp_rank

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self._groups.dp_group

    def get_data_parallel_group_ranks(self) -> list[int]:
        return dist.get_process_group_ranks(self._groups.dp_group)
