"""Tensor-parallel shards of parameters, by the table of model/parameters.py."""

import torch
from torch import Tensor

from llama_mcore.model.config import ModelConfig
from llama_mcore.model.parameters import TpSplit, parameter_of, parameters_of


def parameter_shapes(model: ModelConfig) -> dict[str, torch.Size]:
    """Full shape of every parameter by megatron-core's name, in the order of the model's modules."""
    return {name: torch.Size(parameter.shape(model)) for name, parameter in parameters_of(model)}


def split_of(name: str) -> TpSplit | None:
    """The split of the parameter called `name`; None if every rank holds all of it.

    Raises KeyError for a name that no model has.
    """
    return parameter_of(name).split


def shard(full: Tensor, split: TpSplit | None, tp_rank: int, tp_size: int) -> Tensor:
    """One tensor-parallel rank's part of a full tensor."""
    if split is None or tp_size == 1:
        return full
    parts = full.chunk(split.stride, dim=split.dim)
    return torch.cat([part.chunk(tp_size, dim=split.dim)[tp_rank] for part in parts], dim=split.dim)


def unshard(shards: list[Tensor], split: TpSplit | None) -> Tensor:
    """Full tensor from the parts of all tensor-parallel ranks, in rank order."""
    if split is None or len(shards) == 1:
        return shards[0]
    parts = [shard.chunk(split.stride, dim=split.dim) for shard in shards]
    return torch.cat([part[i] for i in range(split.stride) for part in parts], dim=split.dim)


def local_shape(full: torch.Size, split: TpSplit | None, tp_size: int) -> torch.Size:
    """Shape of one rank's part of a tensor of shape `full`."""
    shape = list(full)
    if split is not None:
        shape[split.dim] //= tp_size
    return torch.Size(shape)


def full_shape(local: torch.Size, split: TpSplit | None, tp_size: int) -> torch.Size:
    """Shape of the full tensor whose part on one rank has shape `local`."""
    shape = list(local)
    if split is not None:
        shape[split.dim] *= tp_size
    return torch.Size(shape)
