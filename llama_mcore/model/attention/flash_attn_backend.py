"""FlashAttention 2 (Dao, 2023) by the package flash-attn: GPU, bf16 or fp16."""

import torch
from torch import Tensor

from llama_mcore.model.attention.backend import AttentionBackend, Limits

NO_WINDOW = {"window_size_left": -1, "window_size_right": -1, "softcap": 0.0, "alibi_slopes": None}


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from flash_attn import flash_attn_func

    out = flash_attn_func(
        *(_batch_first(x) for x in (q, k, v)),
        causal=True,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return _batch_first(out)


def forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    from flash_attn.flash_attn_interface import _flash_attn_forward

    q, k, v = (_batch_first(x) for x in (q, k, v))
    scale = q.size(-1) ** -0.5
    out, log_sum_exp, *_ = _flash_attn_forward(
        q, k, v, 0.0, scale, causal=True, return_softmax=False, **NO_WINDOW
    )
    return _batch_first(out), log_sum_exp


def backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sum_exp: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    from flash_attn.flash_attn_interface import _flash_attn_backward

    grad_out, q, k, v, out = (_batch_first(x) for x in (grad_out, q, k, v, out))
    grads = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    _flash_attn_backward(
        grad_out,
        *(q, k, v, out, log_sum_exp, *grads),
        0.0,
        q.size(-1) ** -0.5,
        causal=True,
        deterministic=torch.are_deterministic_algorithms_enabled(),
        **NO_WINDOW,
    )
    grad_q, grad_k, grad_v = (_batch_first(grad) for grad in grads)
    return grad_q, grad_k, grad_v


def _batch_first(x: Tensor) -> Tensor:
    """[s, b, n, d] <-> [b, s, n, d], a view."""
    return x.transpose(0, 1)


BACKEND = AttentionBackend(
    "FlashAttention 2",
    Limits(
        package="flash-attn",
        install="pip install -e '.[flash]'",
        largest_in_small_memory=192,
        deterministic=True,
    ),
    attend,
    forward,
    backward,
)
