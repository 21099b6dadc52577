"""Attention written out: the definition that the other backends are tested against."""

import torch
from torch import Tensor


def reference_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q [s, b, n, d], k and v [s, b, g, d] -> [s, b, n, d]. Holds all n*s*s scores."""
    s, _, n, d = q.shape
    k, v = (x.repeat_interleave(n // x.size(2), dim=2) for x in (k, v))  # [s, b, n, d]
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = torch.einsum("qbnd,kbnd->bnqk", q.to(wide), k.to(wide)) / d**0.5
    future = torch.ones(s, s, dtype=torch.bool, device=q.device).triu(1)
    weights = scores.masked_fill(future, float("-inf")).softmax(-1)
    return torch.einsum("bnqk,kbnd->qbnd", weights, v.to(wide)).to(q.dtype)
