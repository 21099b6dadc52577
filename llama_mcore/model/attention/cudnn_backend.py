"""cuDNN's attention through torch's forward and backward operators: the fastest on Hopper and Blackwell."""

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from llama_mcore.model.attention.backend import BLACKWELL, HOPPER, NARROW, AttentionBackend, Limits
from llama_mcore.model.attention.torch_layout import (
    attend_by,
    heads_first,
    repeat_heads,
    sequence_first,
    sum_groups,
)

aten = torch.ops.aten


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend_by(SDPBackend.CUDNN_ATTENTION, q, k, v)


def forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    q, k, v = (heads_first(x) for x in (q, k, v))
    k, v = _as_it_computes_right(q, k, v)
    # no bias, with log-sum-exp, no dropout, causal, no debug mask
    out, log_sum_exp = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, True, False)[:2]
    return sequence_first(out), log_sum_exp.flatten(2)  # from [b, n, s, 1]


def backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sum_exp: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    grad_out, q, k, v, out = (heads_first(x) for x in (grad_out, q, k, v, out))
    groups, length = k.size(1), q.size(2)
    k, v = _as_it_computes_right(q, k, v)
    # the generator's state, from which dropout would be repeated
    no_state = torch.zeros((), dtype=torch.int64, device=q.device)
    grad_q, grad_k, grad_v = aten._scaled_dot_product_cudnn_attention_backward(
        *(grad_out, q, k, v, out, log_sum_exp.unsqueeze(-1)),
        *(no_state, no_state),
        *(None, None, None, length, length, 0.0, True),
    )
    grads = grad_q, sum_groups(grad_k, groups), sum_groups(grad_v, groups)
    grad_q, grad_k, grad_v = (sequence_first(grad) for grad in grads)
    return grad_q, grad_k, grad_v


def _as_it_computes_right(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values, repeated where grouped queries are known to go wrong."""
    if q.is_meta:  # which has no capability
        return k, v
    capability = torch.get_device_module(q.device).get_device_capability(q.device)
    repeats = _goes_wrong(capability, k.size(1))
    return (repeat_heads(k, q.size(1)), repeat_heads(v, q.size(1))) if repeats else (k, v)


def _goes_wrong(capability: tuple[int, int], groups: int) -> bool:
    """Fewer than eight key heads on Blackwell (PyTorch issue 193893)."""
    return capability >= BLACKWELL and groups < 8


BACKEND = AttentionBackend(
    "cuDNN's, by torch",
    # aten/src/ATen/native/transformers/cuda/sdp_utils.cpp. Wider heads work in some versions only.
    Limits(oldest=dict.fromkeys(NARROW, HOPPER), largest_head_dim=128, documents=False),
    attend,
    forward,
    backward,
    preference=1,
)
