"""Queries, keys and values out of the fused projection, as attention takes them, and the way back.

    s sequence, b micro-batch, n query heads, g key/value heads, d head width, all of this rank

The first pair is compiled as one function each, so that no part of it is copied on its own.
"""

import torch
from torch import Tensor

from llama_mcore.model.rmsnorm import rmsnorm, rmsnorm_backward
from llama_mcore.model.rope import rope, rope_backward


def rotated_qkv(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads_per_group: int,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """[s, b, (n + 2g) d] -> q [s, b, n, d] and k [s, b, g, d], contiguous, and v [s, b, g, d], a view of qkv.

    q and k are normed where there are weights [d] for that, then rotated by the tables [s, 1, 1, d].
    """
    q, k, v = split_qkv(qkv, heads_per_group, cos.size(-1))
    if q_norm is not None and k_norm is not None:
        q, k = rmsnorm(q, q_norm, eps), rmsnorm(k, k_norm, eps)
    return rope(q, cos, sin), rope(k, cos, sin), v


def rotated_qkv_backward(
    grad_q: Tensor,
    grad_k: Tensor,
    grad_v: Tensor,
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads_per_group: int,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of qkv [s, b, (n + 2g) d] and of the two norms' weights [d], None without norms."""
    grad_q, grad_k = rope_backward(grad_q, cos, sin), rope_backward(grad_k, cos, sin)
    grad_q_norm = grad_k_norm = None
    if q_norm is not None and k_norm is not None:
        q, k, _ = split_qkv(qkv, heads_per_group, cos.size(-1))
        grad_q, grad_q_norm = rmsnorm_backward(grad_q, q, q_norm, eps)
        grad_k, grad_k_norm = rmsnorm_backward(grad_k, k, k_norm, eps)
    return join_qkv(grad_q, grad_k, grad_v), grad_q_norm, grad_k_norm


def split_qkv(qkv: Tensor, heads_per_group: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """[s, b, (n + 2g) d] -> q [s, b, n, d], k [s, b, g, d], v [s, b, g, d].

    megatron-core's layout: per key/value group its query heads, then k, then v.
    """
    grouped = qkv.unflatten(-1, (-1, heads_per_group + 2, head_dim))  # [s, b, g, n/g + 2, d]
    return grouped[:, :, :, :-2].flatten(2, 3), grouped[:, :, :, -2], grouped[:, :, :, -1]


def join_qkv(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The inverse of `split_qkv`."""
    grouped = q.unflatten(2, (k.size(2), -1))  # [s, b, g, n/g, d]
    return torch.cat((grouped, k[:, :, :, None], v[:, :, :, None]), dim=3).flatten(2)
