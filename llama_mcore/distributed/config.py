"""Parallelism of a run over ranks, and sharding of its optimizer state. Imports no torch."""

from typing import Literal

from pydantic import Field

from llama_mcore.config.section import Section


class ParallelConfig(Section):
    """Tensor parallelism; data parallelism is over the remaining ranks: dp = world_size / tp."""

    tp: int = Field(default=1, ge=1)
    """Tensor-parallel ranks; consecutive ranks form a group, so keep it within a node."""
    sequence_parallel: bool = False
    """Split the activations outside the GEMMs along the sequence (Korthikanti et al., 2022).
    Has no effect at tp = 1, where there is nothing to split."""

    def dp(self, world_size: int) -> int:
        """Number of data-parallel ranks in a world."""
        return world_size // self.tp


class ZeroConfig(Section):
    """DeepSpeed ZeRO over the data-parallel ranks."""

    stage: Literal[0, 1, 2, 3] = 1
    """Stage of sharding: 1 optimizer states, 2 also gradients, 3 also weights.
    0 shards nothing and exists as an fp32 reference."""
    config: str | None = None
    """DeepSpeed JSON file with DeepSpeed's own settings; default: ds_configs/zero{stage}.json."""
    reduce_dtype: Literal["fp32", "bf16"] = "fp32"
    """Precision in which gradients are reduced over data-parallel ranks. bf16 halves the bytes and
    rounds the fp32 accumulated gradients."""
