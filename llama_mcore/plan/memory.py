"""Bytes of model state on one rank: weights, gradients, fp32 masters, Adam moments. Pure Python.

Activations, communication buckets and the allocator's slack are not counted.
"""

from dataclasses import dataclass

from llama_mcore.model.config import ModelConfig
from llama_mcore.parallel.config import ParallelConfig, ZeroConfig

FP32, BF16 = 4, 2  # bytes per value
ADAM_MOMENTS = 2


@dataclass(frozen=True)
class ModelState:
    """Bytes per rank."""

    weights: int
    gradients: int
    masters: int
    """fp32 copy that the optimizer updates; 0 where the weights themselves are that copy."""
    moments: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.masters + self.moments


def params_per_rank(model: ModelConfig, tp: int) -> int:
    """Parameters of one tensor-parallel shard: norm weights are replicated, all others are split."""
    norms = (2 * model.num_layers + 1) * model.hidden_size
    return (model.num_params() - norms) // tp + norms


def model_state(
    model: ModelConfig, parallel: ParallelConfig, zero: ZeroConfig, precision: str, world_size: int
) -> ModelState:
    """Model state per rank, as DeepSpeed 0.19 allocates it with fp32 gradient accumulation.

    ZeRO-1 in bf16 keeps a whole fp32 gradient buffer (BF16_Optimizer); stages 2 and 3 accumulate
    in the rank's own partition.
    """
    params = params_per_rank(model, parallel.tp)
    dp = world_size // parallel.tp
    shard = -(-params // dp)
    optimizer_params = shard if zero.stage >= 1 else params
    gradient_params = shard if zero.stage >= 2 else params
    weight_params = shard if zero.stage >= 3 else params
    weight_bytes = BF16 if precision == "bf16" else FP32
    weights_are_masters = precision == "fp32" and zero.stage == 0
    return ModelState(
        weights=weight_bytes * weight_params,
        gradients=FP32 * gradient_params,
        masters=0 if weights_are_masters else FP32 * optimizer_params,
        moments=ADAM_MOMENTS * FP32 * optimizer_params,
    )
