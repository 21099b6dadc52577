"""Helpers for torch's own attention kernels: their layouts, and repeated heads for grouped queries."""

import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel


def attend_by(kernel: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(q [s, b, n, d], k, v [s, b, g, d]) -> [s, b, n, d] under autograd, by this kernel only."""
    q, k, v = (heads_first(x) for x in (q, k, v))
    with sdpa_kernel(kernel):
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.size(1) != k.size(1))
    return sequence_first(out)


def heads_first(x: Tensor) -> Tensor:
    """[s, b, n, d] -> [b, n, s, d], a view."""
    return x.permute(1, 2, 0, 3)


def sequence_first(x: Tensor) -> Tensor:
    """[b, n, s, d] -> [s, b, n, d], a view."""
    return x.permute(2, 0, 1, 3)


def one_batch(x: Tensor) -> Tensor:
    """[s, b, n, d] -> [1, b n, s, d], a view of x as of v in the fused projection: every head of every row of
    the batch as a head of its own, which leaves each query with its own key.

    So it lies as kernels want it that copy an output or its gradient unless [b, s, n, d] is contiguous.
    """
    return x.flatten(1, 2).transpose(0, 1).unsqueeze(0)


def from_one_batch(x: Tensor, batch: int) -> Tensor:
    """[1, b n, s, d] -> [s, b, n, d], a view."""
    return x[0].transpose(0, 1).unflatten(1, (batch, -1))


def repeat_heads(x: Tensor, heads: int) -> Tensor:
    """[b, g, s, d] -> [b, n, s, d], for kernels that want as many key heads as query heads."""
    return x.repeat_interleave(heads // x.size(1), dim=1) if heads > x.size(1) else x


def sum_groups(grad: Tensor, groups: int) -> Tensor:
    """[b, n, s, d] -> [b, g, s, d], the transpose of `repeat_heads`."""
    return grad.unflatten(1, (groups, -1)).sum(2) if grad.size(1) > groups else grad
