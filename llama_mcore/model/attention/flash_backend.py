"""torch's own flash kernels (Dao, 2023), for GPU and CPU.

The manual backward calls the ATen operators, since torch's public function returns no log-sum-exp.
"""

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from llama_mcore.model.attention.backend import AttentionBackend, Limits
from llama_mcore.model.attention.torch_layout import (
    attend_by,
    heads_first,
    repeat_heads,
    sequence_first,
    sum_groups,
)

aten = torch.ops.aten


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend_by(SDPBackend.FLASH_ATTENTION, q, k, v)


def forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    q, k, v = (heads_first(x) for x in (q, k, v))
    if q.is_cpu:
        out, log_sum_exp = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True)
    else:
        k, v = (repeat_heads(x, q.size(1)) for x in (k, v))
        out, log_sum_exp = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True)[:2]
    return sequence_first(out), log_sum_exp


def backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sum_exp: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    grad_out, q, k, v, out = (heads_first(x) for x in (grad_out, q, k, v, out))
    if q.is_cpu:
        grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad_out, q, k, v, out, log_sum_exp, 0.0, True
        )
    else:
        grads = _gpu_backward(grad_out, q, k, v, out, log_sum_exp)
    grad_q, grad_k, grad_v = (sequence_first(grad) for grad in grads)
    return grad_q, grad_k, grad_v


def _gpu_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sum_exp: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; summed in a fixed order under torch.use_deterministic_algorithms only."""
    groups, length = k.size(1), q.size(2)
    # the generator's state, from which dropout would be repeated
    no_state = torch.empty(0, dtype=torch.int64, device=q.device)
    k, v = (repeat_heads(x, q.size(1)) for x in (k, v))
    grad_q, grad_k, grad_v = aten._scaled_dot_product_flash_attention_backward(
        *(grad_out, q, k, v, out, log_sum_exp),
        *(None, None, length, length, 0.0, True),
        *(no_state, no_state),
    )
    return grad_q, sum_groups(grad_k, groups), sum_groups(grad_v, groups)


BACKEND = AttentionBackend(
    "FlashAttention 2, by torch",
    # aten/src/ATen/native/transformers/cuda/sdp_utils.cpp. The backward adds in any order unless
    # torch.use_deterministic_algorithms is on (attention_backward.cu).
    Limits(on_cpu=True, largest_in_small_memory=192, deterministic=True),
    attend,
    forward,
    backward,
    preference=2,
)
