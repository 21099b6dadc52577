"""How megatron-core's fused weights come apart, and go together again. Pure functions on full tensors.

h hidden, n query heads, g key/value groups, d head width, f ffn
"""

import torch
from torch import Tensor

from llama_mcore.model.config import ModelConfig
from llama_mcore.model.parameters import parameter_of


def split(name: str, weight: Tensor, model: ModelConfig) -> tuple[Tensor, ...]:
    """The parts of the parameter with this canonical name; itself if it is not fused."""
    fused = parameter_of(name).fused
    if fused == "qkv":
        return split_qkv(weight, model)
    if fused == "gate_up":
        return split_gate_up(weight)
    return (weight,)


def join(name: str, parts: tuple[Tensor, ...], model: ModelConfig) -> Tensor:
    """Inverse of `split`."""
    fused = parameter_of(name).fused
    if fused == "qkv":
        q, k, v = parts
        return join_qkv(q, k, v, model)
    if fused == "gate_up":
        gate, up = parts
        return join_gate_up(gate, up)
    (weight,) = parts
    return weight


def split_qkv(weight: Tensor, model: ModelConfig) -> tuple[Tensor, Tensor, Tensor]:
    """[g * (n/g + 2) * d, h] -> q [n*d, h], k [g*d, h], v [g*d, h].

    megatron-core stores, for each group, the rows of its query heads, then those of k, then those of v. The
    rows of a head stay as they are: rotary embedding is half-split here and in Hugging Face.
    """
    groups, d = model.num_query_groups, model.head_dim
    grouped = weight.view(groups, -1, d, weight.size(1))  # [g, n/g + 2, d, h]
    q, k, v = grouped[:, :-2], grouped[:, -2], grouped[:, -1]
    return q.flatten(0, 2).contiguous(), k.flatten(0, 1).contiguous(), v.flatten(0, 1).contiguous()


def join_qkv(q: Tensor, k: Tensor, v: Tensor, model: ModelConfig) -> Tensor:
    """Inverse of `split_qkv`."""
    groups, d = model.num_query_groups, model.head_dim
    grouped = [part.view(groups, -1, d, part.size(1)) for part in (q, k, v)]
    return torch.cat(grouped, dim=1).flatten(0, 2)


def split_gate_up(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[2f, h] -> gate [f, h], up [f, h]."""
    gate, up = weight.chunk(2)
    return gate, up


def join_gate_up(gate: Tensor, up: Tensor) -> Tensor:
    """Inverse of `split_gate_up`."""
    return torch.cat((gate, up))


def padded(weight: Tensor, rows: int) -> Tensor:
    """With rows of zeros up to `rows`, as tensor parallelism needs of a vocabulary."""
    if weight.size(0) == rows:
        return weight
    return torch.cat((weight, weight.new_zeros(rows - weight.size(0), *weight.shape[1:])))


def is_vocabulary(name: str) -> bool:
    """Whether the rows of the parameter with this canonical name are tokens."""
    return parameter_of(name).is_vocabulary


def interleaved(weight: Tensor, heads: int) -> Tensor:
    """Rows of a q or k projection [heads * d, h] as the original release has them, from half-split ones.

    Rotary embedding turns two channels of a head together: channel i and i + d/2 here, 2i and 2i + 1 there.
    """
    halves = weight.view(heads, 2, -1, weight.size(1))  # [heads, 2, d/2, h]
    return halves.transpose(1, 2).reshape(weight.shape)


def half_split(weight: Tensor, heads: int) -> Tensor:
    """Inverse of `interleaved`."""
    pairs = weight.view(heads, -1, 2, weight.size(1))  # [heads, d/2, 2, h]
    return pairs.transpose(1, 2).reshape(weight.shape)
