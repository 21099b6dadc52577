"""How tensor parallelism cuts each parameter: one table, and the cut and join that follow from it."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Cut:
    """Along `dim`, in `stride` equal parts that are cut one by one.

    fc1 holds gate above up, and each rank needs its rows of both: stride 2.
    """

    dim: int
    stride: int = 1


CUTS: dict[str, Cut] = {
    "word_embeddings.weight": Cut(dim=0),
    "output_layer.weight": Cut(dim=0),
    "linear_qkv.weight": Cut(dim=0),
    "linear_proj.weight": Cut(dim=1),
    "linear_fc1.weight": Cut(dim=0, stride=2),
    "linear_fc2.weight": Cut(dim=1),
}
REPLICATED = ("layernorm.weight",)


def cut_of(name: str) -> Cut | None:
    """The cut of the parameter called `name`; None if every rank holds all of it."""
    for suffix, cut in CUTS.items():
        if name.endswith(suffix):
            return cut
    if name.endswith(REPLICATED):
        return None
    raise KeyError(f"no tensor-parallel rule for parameter {name}")


def shard(full: Tensor, cut: Cut | None, tp_rank: int, tp_size: int) -> Tensor:
    """The part of a full tensor that one tensor-parallel rank holds."""
    if cut is None or tp_size == 1:
        return full
    parts = full.chunk(cut.stride, dim=cut.dim)
    return torch.cat([part.chunk(tp_size, dim=cut.dim)[tp_rank] for part in parts], dim=cut.dim)


def unshard(shards: list[Tensor], cut: Cut | None) -> Tensor:
    """The full tensor from the parts of all tensor-parallel ranks, in rank order."""
    if cut is None or len(shards) == 1:
        return shards[0]
    parts = [shard.chunk(cut.stride, dim=cut.dim) for shard in shards]
    return torch.cat([part[i] for i in range(cut.stride) for part in parts], dim=cut.dim)


def full_shape(local: torch.Size, cut: Cut | None, tp_size: int) -> torch.Size:
    """Shape of the full tensor of which one rank holds `local`."""
    shape = list(local)
    if cut is not None:
        shape[cut.dim] *= tp_size
    return torch.Size(shape)


def mark_tensor_parallel(model: nn.Module) -> None:
    """Set megatron-core's attributes on every cut parameter.

    DeepSpeed counts a parameter without `tensor_model_parallel` on tensor-parallel rank 0 only, so a
    missing mark gives a wrong gradient norm without any other sign. Hence a rule for every parameter.
    """
    for name, parameter in model.named_parameters():
        cut = cut_of(name)
        parameter.tensor_model_parallel = cut is not None  # type: ignore[attr-defined]
        parameter.partition_dim = cut.dim if cut else -1  # type: ignore[attr-defined]
        parameter.partition_stride = cut.stride if cut else 1  # type: ignore[attr-defined]
