"""Bytes of model state on one rank: weights, gradients, fp32 masters, Adam moments. Imports no torch.

As DeepSpeed 0.19 allocates them, with the padding of its flat buffers: tests/plan/layout/test_allocated.py
compares with what its engine holds, to the byte. plan/layout/footprint.py adds what comes on top.
"""

from dataclasses import dataclass
from functools import cache
from itertools import accumulate

from llama_mcore.distributed.config import ParallelConfig, ZeroConfig
from llama_mcore.model.config import ModelConfig
from llama_mcore.model.parameters import parameters_of

FP32, BF16 = 4, 2  # bytes per value
ADAM_MOMENTS = 2
PERSISTENT_VALUES = 100_000
"""ds_configs/zero3.json, stage3_param_persistence_threshold: smaller parameters stay whole on each rank."""


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

    @property
    def saved(self) -> int:
        """Part that a checkpoint holds, and that a save copies to host memory: fp32 weights and moments.

        At stage 0 the first data-parallel rank saves for all.
        """
        return self.moments // ADAM_MOMENTS * (1 + ADAM_MOMENTS)


@dataclass(frozen=True)
class _Parameters:
    """Sizes of the parameters of one tensor-parallel shard, by optimizer group and in the module's order."""

    matrices: list[int]
    norms: list[int]

    @property
    def groups(self) -> tuple[list[int], list[int]]:
        return self.matrices, self.norms

    @property
    def all(self) -> list[int]:
        return self.matrices + self.norms


@cache  # a search over layouts asks for the same few again and again
def _parameters(model: ModelConfig, tp: int) -> _Parameters:
    sizes = [(parameter.is_norm, parameter.size(model, tp)) for _, parameter in parameters_of(model)]
    return _Parameters(
        matrices=[size for is_norm, size in sizes if not is_norm],
        norms=[size for is_norm, size in sizes if is_norm],
    )


def params_per_rank(model: ModelConfig, tp: int) -> int:
    """Parameters of one tensor-parallel shard: norm weights are replicated, all others are split."""
    return sum(_parameters(model, tp).all)


def model_state(
    model: ModelConfig, parallel: ParallelConfig, zero: ZeroConfig, precision: str, world_size: int
) -> ModelState:
    """Model state on the fullest rank, with fp32 gradient accumulation, before the optimizer's step."""
    parameters, dp = _parameters(model, parallel.tp), parallel.dp(world_size)
    weight_bytes = BF16 if precision == "bf16" else FP32
    if zero.stage == 0:
        values = sum(parameters.all)
        return ModelState(weight_bytes * values, FP32 * values, 0, ADAM_MOMENTS * FP32 * values)
    if zero.stage == 3:
        return _stage_3(parameters, dp, weight_bytes)
    whole = sum(_padded(group, dp) for group in parameters.groups)
    owned = whole // dp
    if zero.stage == 2:
        gradients = owned if precision == "bf16" else _touched(parameters, dp)
    else:
        # bf16 accumulates in a flat buffer; fp32 in the parameters' own gradients, without padding
        gradients = whole if precision == "bf16" else sum(parameters.all)
    return ModelState(
        weights=weight_bytes * whole,
        gradients=FP32 * gradients,
        masters=FP32 * owned,
        moments=ADAM_MOMENTS * FP32 * owned,
    )


def _stage_3(parameters: _Parameters, dp: int, weight_bytes: int) -> ModelState:
    """Model state at stage 3: each parameter is padded to a multiple of dp and split by itself; a small one
    is kept whole besides, with its padding."""
    owned = sum(-(-values // dp) for values in parameters.all)
    persistent = sum(-(-values // dp) * dp for values in parameters.all if values <= PERSISTENT_VALUES)
    return ModelState(
        weights=weight_bytes * (owned + persistent),
        gradients=FP32 * owned,
        masters=FP32 * owned,
        moments=ADAM_MOMENTS * FP32 * owned,
    )


def _padded(group: list[int], dp: int) -> int:
    """Size of a group's flat buffer, which DeepSpeed pads to a multiple of 2 * dp values: 4 bytes of bf16 a
    rank (`nccl_start_alignment_factor` in stage_1_and_2.py and bf16_optimizer.py)."""
    alignment = 2 * dp
    return -(-sum(group) // alignment) * alignment


def _touched(parameters: _Parameters, dp: int) -> int:
    """Total size of the parameters of which a rank owns a part, on the rank with the most.

    In fp32, stage 2 keeps these gradients whole (`copy_grads_in_partition` in stage_1_and_2.py). The total
    changes from one rank to the next only where a parameter begins or ends: these and their next neighbours
    are enough to find the maximum.
    """
    places = [_places(group, _padded(group, dp) // dp) for group in parameters.groups]
    edges = {rank for group in places for first, last, _ in group for rank in (first, last, last + 1)}
    return max(
        sum(values for group in places for first, last, values in group if first <= rank <= last)
        for rank in edges
        if rank < dp
    )


def _places(group: list[int], size: int) -> list[tuple[int, int, int]]:
    """First and last rank that own a part of each parameter, and its size; each rank owns `size` values."""
    starts = accumulate(group, initial=0)
    return [
        (start // size, (start + values - 1) // size, values)
        for start, values in zip(starts, group, strict=False)
    ]
