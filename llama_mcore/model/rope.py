"""Rotary position embedding (Su et al., 2021) in the half-split convention of Hugging Face.

Channel i turns with channel i + d/2. The original release pairs neighbouring channels; the two differ by
a permutation of the rows of the q and k projections, which checkpoint conversion applies.
"""

from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=8)
def rope_table(seq_length: int, head_dim: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin of position * theta^(-2i/d), each [s, 1, 1, d/2] fp32.

    Cached, since every layer of a model uses the same table. Angles are computed in float64: at position
    2^17 an fp32 product would already be off by 1e-2 radians.
    """
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float64, device=device) / head_dim
    positions = torch.arange(seq_length, dtype=torch.float64, device=device)
    angles = torch.outer(positions, theta**-exponent)[:, None, None, :]
    return angles.cos().float(), angles.sin().float()


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [s, b, n, d] by tables [s, 1, 1, d/2], in fp32 or wider; the result has x's dtype."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def rope_backward(grad: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Gradient of the input: a rotation's transpose turns back."""
    return rope(grad, cos, -sin)
