"""Parameters as other formats name and split them. Pure functions on full tensors.

The canonical name of a parameter is megatron-core's. What megatron-core fuses, qkv and gate|up, has several
names elsewhere, one for each of its parts.

h hidden, n query heads, g key/value groups, d head width, f ffn
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from llama_mcore.model.config import ModelConfig
from llama_mcore.model.parameters import PARAMETERS, parameter_of, pattern_of
from llama_mcore.model.sharding import parameter_shapes


class NameTable:
    """Names of a format by canonical name, and the other way round. Raises KeyError for an unknown name."""

    def __init__(self, table: dict[str, tuple[str, ...]]) -> None:
        """`{}` in names stands for the number of the layer."""
        self._names = table
        self._canonical = {part: canonical for canonical, parts in table.items() for part in parts}

    def parts(self, canonical: str) -> tuple[str, ...]:
        """The format's names of the parts of a canonical parameter."""
        pattern, layer = pattern_of(canonical)
        return tuple(part.format(layer) for part in self._names[pattern])

    def canonical(self, part: str) -> str:
        """The canonical parameter that a name of the format is a part of."""
        pattern, layer = pattern_of(part)
        return self._canonical[pattern].format(layer)

    def split(self, canonical: str, weight: Tensor, model: ModelConfig) -> Iterator[tuple[str, Tensor]]:
        """The parts of a weight under the format's names."""
        return zip(self.parts(canonical), split(canonical, weight, model), strict=True)

    def shapes(self, model: ModelConfig) -> dict[str, torch.Size]:
        """Full shape of every tensor under the format's name, in the order of the model."""
        return {
            part: tensor.shape
            for name, shape in parameter_shapes(model).items()
            for part, tensor in self.split(name, torch.empty(shape, device="meta"), model)
        }


HUGGING_FACE = NameTable({parameter.name: parameter.hugging_face for parameter in PARAMETERS})
META = NameTable({parameter.name: parameter.meta for parameter in PARAMETERS})


def split(name: str, weight: Tensor, model: ModelConfig) -> tuple[Tensor, ...]:
    """The parts of the parameter with this canonical name; the parameter itself if it is not fused."""
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
    """`weight` with rows of zeros up to `rows`, so that tensor parallelism can split a vocabulary."""
    if weight.size(0) == rows:
        return weight
    return torch.cat((weight, weight.new_zeros(rows - weight.size(0), *weight.shape[1:])))


def is_vocabulary(name: str) -> bool:
    """True if the rows of the parameter with this canonical name are tokens."""
    return parameter_of(name).is_vocabulary


def interleaved(weight: Tensor, heads: int) -> Tensor:
    """Rows of a q or k projection [heads * d, h] in the order of the original release, from half-split ones.

    Rotary embedding rotates two channels of a head together: i and i + d/2 here, 2i and 2i + 1 there.
    """
    halves = weight.view(heads, 2, -1, weight.size(1))  # [heads, 2, d/2, h]
    return halves.transpose(1, 2).reshape(weight.shape)


def half_split(weight: Tensor, heads: int) -> Tensor:
    """Inverse of `interleaved`."""
    pairs = weight.view(heads, -1, 2, weight.size(1))  # [heads, d/2, 2, h]
    return pairs.transpose(1, 2).reshape(weight.shape)
