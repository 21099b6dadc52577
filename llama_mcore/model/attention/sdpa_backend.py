"""torch's scaled_dot_product_attention: flash kernels on a GPU, a flash kernel on the CPU.

By hand its two halves are called under their ATen names, since the public function gives no log-sum-exp.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from llama_mcore.model.attention.backend import AttentionBackend

aten = torch.ops.aten


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (heads_first(x) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.size(1) != k.size(1))
    return _sequence_first(out)


def forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    q, k, v = (heads_first(x) for x in (q, k, v))
    if q.is_cpu:
        out, log_sum_exp = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True)
    else:
        k, v = (_repeat(x, q.size(1)) for x in (k, v))
        out, log_sum_exp = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True)[:2]
    return _sequence_first(out), log_sum_exp


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
    grad_q, grad_k, grad_v = (_sequence_first(grad) for grad in grads)
    return grad_q, grad_k, grad_v


def _gpu_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sum_exp: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    groups, length = k.size(1), q.size(2)
    # The kernel reads the generator's state to repeat dropout, of which there is none.
    no_state = torch.empty(0, dtype=torch.int64, device=q.device)
    grad_q, grad_k, grad_v = aten._scaled_dot_product_flash_attention_backward(
        grad_out,
        q,
        _repeat(k, q.size(1)),
        _repeat(v, q.size(1)),
        out,
        log_sum_exp,
        None,
        None,
        length,
        length,
        0.0,
        True,
        no_state,
        no_state,
    )
    return grad_q, _sum_groups(grad_k, groups), _sum_groups(grad_v, groups)


def heads_first(x: Tensor) -> Tensor:
    """[s, b, n, d] -> [b, n, s, d], a view."""
    return x.permute(1, 2, 0, 3)


def _sequence_first(x: Tensor) -> Tensor:
    """[b, n, s, d] -> [s, b, n, d], a view."""
    return x.permute(2, 0, 1, 3)


def _repeat(x: Tensor, heads: int) -> Tensor:
    """[b, g, s, d] -> [b, n, s, d]: the GPU kernel wants as many key heads as query heads."""
    return x.repeat_interleave(heads // x.size(1), dim=1)


def _sum_groups(grad: Tensor, groups: int) -> Tensor:
    """[b, n, s, d] -> [b, g, s, d], the transpose of `_repeat`."""
    return grad.unflatten(1, (groups, -1)).sum(2)


BACKEND = AttentionBackend(attend, forward, backward)
