"""Attention written out in plain operations: the definition that the other backends are tested against."""

import torch
from torch import Tensor

from llama_mcore.model.attention.backend import ANY_WIDTH, DTYPES, AttentionBackend, Limits
from llama_mcore.model.precision import widen


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention under autograd; holds all N * S * S scores."""
    scores = _scores(q, k)
    return _mix(scores.softmax(-1), v).to(q.dtype)


def forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    scores = _scores(q, k)
    log_sum_exp = scores.logsumexp(-1)  # [b, n, s]
    return _mix((scores - log_sum_exp[..., None]).exp(), v).to(q.dtype), log_sum_exp


def backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sum_exp: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, with the weights restored from the log-sum-exp (Dao et al., 2022, B.2)."""
    heads_per_group = q.size(2) // k.size(2)
    weights = (_scores(q, k) - log_sum_exp[..., None]).exp()
    wide_grad = widen(grad_out)
    grad_v = torch.einsum("bnqk,qbnd->kbnd", weights, wide_grad)
    grad_weights = torch.einsum("qbnd,kbnd->bnqk", wide_grad, widen(_repeat(v, heads_per_group)))
    row_sum = (wide_grad * widen(out)).sum(-1).permute(1, 2, 0)[..., None]  # [b, n, s, 1]
    grad_scores = weights * (grad_weights - row_sum) / q.size(-1) ** 0.5
    grad_q = torch.einsum("bnqk,kbnd->qbnd", grad_scores, widen(_repeat(k, heads_per_group)))
    grad_k = torch.einsum("bnqk,qbnd->kbnd", grad_scores, widen(q))
    return (
        grad_q.to(q.dtype),
        _sum_groups(grad_k, heads_per_group).to(k.dtype),
        _sum_groups(grad_v, heads_per_group).to(v.dtype),
    )


def _scores(q: Tensor, k: Tensor) -> Tensor:
    """Scaled scores [b, n, s, s] in fp32 or wider, the future at -inf."""
    s, _, n, d = q.shape
    k = _repeat(k, n // k.size(2))
    scores = torch.einsum("qbnd,kbnd->bnqk", widen(q), widen(k)) / d**0.5
    future = torch.ones(s, s, dtype=torch.bool, device=q.device).triu(1)
    return scores.masked_fill(future, float("-inf"))


def _mix(weights: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("bnqk,kbnd->qbnd", weights, widen(_repeat(v, weights.size(1) // v.size(2))))


def _repeat(x: Tensor, heads_per_group: int) -> Tensor:
    """[s, b, g, d] -> [s, b, n, d]."""
    return x.repeat_interleave(heads_per_group, dim=2)


def _sum_groups(grad: Tensor, heads_per_group: int) -> Tensor:
    """[s, b, n, d] -> [s, b, g, d], the transpose of `_repeat`."""
    return grad.unflatten(2, (-1, heads_per_group)).sum(3)


BACKEND = AttentionBackend(
    "holds all scores; the definition that the others are compared with",
    Limits(
        on_cpu=True,
        oldest=dict.fromkeys(DTYPES, (0, 0)),
        head_dim_multiple=1,
        largest_head_dim=ANY_WIDTH,
        deterministic=True,
    ),
    attend,
    forward,
    backward,
    preference=4,
)
