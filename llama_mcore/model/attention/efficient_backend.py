"""torch's memory-efficient attention (Rabe and Staats, 2021), by xformers' kernel.

It is torch's only fused attention for fp32 on a GPU.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

from llama_mcore.model.attention.backend import AMPERE, ANY_WIDTH, MAXWELL, AttentionBackend, Limits
from llama_mcore.model.attention.torch_layout import (
    attend_by,
    from_one_batch,
    one_batch,
    repeat_heads,
    sum_groups,
)

aten = torch.ops.aten
# aten/src/ATen/native/transformers/cuda/mem_eff_attention/kernel_forward.h, kAlignLSE
_LSE_ROWS = 32


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (x.repeat_interleave(q.size(2) // x.size(2), dim=2) for x in (k, v))
    return attend_by(SDPBackend.EFFICIENT_ATTENTION, q, k, v)


def forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    length, batch = q.shape[:2]
    q, k, v = (one_batch(x) for x in (q, k, v))
    k, v = (repeat_heads(x, q.size(1)) for x in (k, v))
    # no bias, with log-sum-exp, no dropout, causal
    out, log_sum_exp = aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, True)[:2]
    # the kernel's has rows up to a multiple of 32
    return from_one_batch(out, batch), log_sum_exp[0, :, :length].unflatten(0, (batch, -1))


def backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sum_exp: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    batch = q.size(1)
    grad_out, q, k, v, out = (one_batch(x) for x in (grad_out, q, k, v, out))
    groups = k.size(1)
    k, v = (repeat_heads(x, q.size(1)) for x in (k, v))
    # exp(score - inf) = 0, as the kernel's own forward fills them
    log_sum_exp = F.pad(log_sum_exp.flatten(0, 1), (0, -q.size(2) % _LSE_ROWS), value=math.inf)
    no_state = torch.empty((), dtype=torch.int64, device=q.device)  # for dropout, which is off
    grad_q, grad_k, grad_v, _ = aten._scaled_dot_product_efficient_attention_backward(
        *(grad_out, q, k, v, None, out, log_sum_exp.unsqueeze(0)),
        *(no_state, no_state, 0.0, [True, True, True, False], True),
    )
    grads = grad_q, sum_groups(grad_k, groups), sum_groups(grad_v, groups)
    grad_q, grad_k, grad_v = (from_one_batch(grad, batch) for grad in grads)
    return grad_q, grad_k, grad_v


BACKEND = AttentionBackend(
    "torch's memory-efficient kernel",
    # As for flash_backend.py.
    Limits(
        oldest={torch.bfloat16: AMPERE, torch.float16: MAXWELL, torch.float32: MAXWELL},
        largest_head_dim=ANY_WIDTH,
        deterministic=True,
    ),
    attend,
    forward,
    backward,
    preference=3,
)
