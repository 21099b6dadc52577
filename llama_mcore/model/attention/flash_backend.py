"""torch's own flash kernels (Dao, 2023), for GPU and CPU.

The manual backward calls the ATen operators, since torch's public function returns no log-sum-exp.
"""

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from llama_mcore.model.attention.backend import AttentionBackend, Limits
from llama_mcore.model.attention.torch_layout import attend_by, from_one_batch, one_batch

aten = torch.ops.aten


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend_by(SDPBackend.FLASH_ATTENTION, q, k, v)


def forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    batch = q.size(1)
    q, k, v = (one_batch(x) for x in (q, k, v))
    if q.is_cpu:
        out, log_sum_exp = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True)
    else:
        out, log_sum_exp = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True)[:2]
    return from_one_batch(out, batch), log_sum_exp[0].unflatten(0, (batch, -1))


def backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sum_exp: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; on a GPU summed in a fixed order under torch.use_deterministic_algorithms
    only."""
    batch, length = q.size(1), q.size(0)
    grad_out, q, k, v, out = (one_batch(x) for x in (grad_out, q, k, v, out))
    saved = grad_out, q, k, v, out, log_sum_exp.flatten(0, 1).unsqueeze(0)
    if q.is_cpu:
        grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(*saved, 0.0, True)
    else:
        # the generator's state, from which dropout would be repeated
        no_state = torch.empty(0, dtype=torch.int64, device=q.device)
        grads = aten._scaled_dot_product_flash_attention_backward(
            *saved, None, None, length, length, 0.0, True, no_state, no_state
        )
    grad_q, grad_k, grad_v = (from_one_batch(grad, batch) for grad in grads)
    return grad_q, grad_k, grad_v


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
