"""Rotary position embedding (Su et al., 2021) in the half-split convention of Hugging Face.

Channel i is rotated with channel i + d/2. The original release pairs neighbouring channels; the two differ by
a permutation of the rows of the q and k projections, which checkpoint conversion applies.
"""

import math
from functools import lru_cache

import torch
from torch import Tensor

from llama_mcore.model.config import RopeScaling


@lru_cache(maxsize=8)
def rope_table(
    seq_length: int,
    head_dim: int,
    theta: float,
    device: torch.device,
    scaling: RopeScaling | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """cos and signed sin of position * frequency, each [s, 1, 1, d]; frequency i is theta^(-2i/d).

    Both halves of the channels have the same angles, the first half with -sin, as `rope` multiplies them.

    Cached, since every layer of a model uses the same table. Angles are computed in float64: at position
    2^17 an fp32 product would already be off by 1e-2 radians.
    """
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float64, device=device) / head_dim
    frequency = theta**-exponent
    if scaling is not None:
        frequency = _stretched(frequency, scaling)
    positions = torch.arange(seq_length, dtype=torch.float64, device=device)
    angles = torch.outer(positions, frequency)[:, None, None, :]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), -1).to(dtype), torch.cat((-sin, sin), -1).to(dtype)


def _stretched(frequency: Tensor, scaling: RopeScaling) -> Tensor:
    """Frequencies stretched for a longer context, as by Llama 3.1's `apply_scaling`.

    One that turns more than `high_freq_factor` times within the original context stays, one that turns less
    than `low_freq_factor` times is divided by `factor`, and between the two the division fades in linearly in
    the number of turns.
    """
    turns = scaling.original_seq_length * frequency / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return frequency * (kept + (1 - kept) / scaling.factor)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [s, b, n, d] by the tables [s, 1, 1, d], in their dtype; the result has x's dtype."""
    first, second = x.chunk(2, dim=-1)
    swapped = torch.cat((second, first), dim=-1).to(cos.dtype)
    return (x.to(cos.dtype) * cos).addcmul_(swapped, sin).to(x.dtype)


def rope_backward(grad: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Gradient of the input: the rotation reversed, since that is its transpose."""
    return rope(grad, cos, -sin)
