"""xformers' memory-efficient attention (Lefaudeux et al., 2022), which the paper used; on a GPU."""

import torch
from torch import Tensor

from llama_mcore.model.attention.backend import AMPERE, NARROW, AttentionBackend, Limits


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from xformers.ops import LowerTriangularMask, memory_efficient_attention

    q, k, v = _prepared(q, k, v)
    return memory_efficient_attention(q, k, v, attn_bias=LowerTriangularMask()).transpose(0, 1)


def forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    from xformers.ops import LowerTriangularMask, fmha

    q, k, v = _prepared(q, k, v)
    out, log_sum_exp = fmha.memory_efficient_attention_forward_requires_grad(
        q, k, v, attn_bias=LowerTriangularMask()
    )
    return out.transpose(0, 1), log_sum_exp


def backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sum_exp: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    from xformers.ops import LowerTriangularMask, fmha

    groups = k.size(2)
    wide_q, wide_k, wide_v = _prepared(q, k, v)
    grad_q, grad_k, grad_v = fmha.memory_efficient_attention_backward(
        grad_out.transpose(0, 1).contiguous(),
        out.transpose(0, 1),
        log_sum_exp,
        wide_q,
        wide_k,
        wide_v,
        attn_bias=LowerTriangularMask(),
    )
    return grad_q.transpose(0, 1), _sum_groups(grad_k, groups), _sum_groups(grad_v, groups)


def _prepared(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[s, b, n, d] and [s, b, g, d] -> all [b, s, n, d]: the operator takes equal numbers of heads."""
    repeats = q.size(2) // k.size(2)
    k, v = (torch.repeat_interleave(x, repeats, dim=2) for x in (k, v))
    return q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)


def _sum_groups(grad: Tensor, groups: int) -> Tensor:
    """[b, s, n, d] -> [s, b, g, d]."""
    return grad.unflatten(2, (groups, -1)).sum(3).transpose(0, 1)


BACKEND = AttentionBackend(
    "the paper's attention",
    Limits(
        package="xformers",
        install="pip install -e '.[gpu]'",
        oldest=dict.fromkeys((*NARROW, torch.float32), AMPERE),
    ),
    attend,
    forward,
    backward,
)
