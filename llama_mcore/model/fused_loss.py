"""Cross-entropy fused with the output projection, vocabulary-parallel and in chunks of tokens.

    T tokens of the micro-batch (s * b), c tokens of one chunk, h hidden, v vocabulary of this rank

The logits are the largest tensor of a small model: T * v in fp32, and as much again for their gradient.
Here the logits of a chunk give its losses and its part of both gradients at once, and are then dropped. That
works because the loss is a mean: its gradient is known up to one factor, which the backward multiplies in.
"""

from typing import Any

import torch
from torch import Tensor

from llama_mcore.distributed.tp_comm import TensorParallel
from llama_mcore.model.kernels import PLAIN, Kernels
from llama_mcore.model.loss_chunk import loss_chunk_rows
from llama_mcore.model.weight_grad import add_product, add_to_main_grad


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    loss_mask: Tensor | None,
    tp: TensorParallel,
    kernels: Kernels = PLAIN,
) -> Tensor:
    """Mean loss in nats, a scalar in fp32 or wider, over the tokens where `loss_mask` is 1.

    hidden [s, b, h] (s/tp under sequence parallelism), weight [v, h] this rank's rows, labels [b, s] int64,
    loss_mask [b, s] or None for all. Runs an all-gather of hidden under sequence parallelism and a small one
    per chunk; the backward reduces the gradient of hidden.
    """
    return _LinearCrossEntropy.apply(hidden, weight, labels, loss_mask, tp, kernels, torch.is_grad_enabled())


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        loss_mask: Tensor | None,
        tp: TensorParallel,
        kernels: Kernels,
        with_gradients: bool,
    ) -> Tensor:
        whole = tp.start_gather(hidden).wait()  # [s, b, h]
        tokens = whole.flatten(0, 1)  # [T, h]
        targets = labels.t().reshape(-1)  # [T], in the order of `tokens`
        mask = None if loss_mask is None else loss_mask.t().reshape(-1)
        wide = torch.promote_types(weight.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=weight.device)
        grad_tokens = torch.empty_like(tokens) if with_gradients else None
        grad_weight = torch.empty_like(weight, dtype=wide) if with_gradients else None
        size = loss_chunk_rows(len(tokens), len(weight), on_gpu=not weight.is_cpu)
        all_logits = tokens.new_empty(size, len(weight))
        # On a CPU large fresh memory costs more than what is computed in it: every chunk uses the same.
        reuses = weight.is_cpu and weight.dtype != wide
        scratch = torch.empty_like(all_logits, dtype=wide) if reuses else None
        part = torch.empty_like(weight) if reuses and with_gradients else None
        for start in range(0, len(tokens), size):
            rows = slice(start, min(start + size, len(tokens)))
            logits = torch.mm(tokens[rows], weight.t(), out=all_logits[: rows.stop - start])  # [c, v]
            total += kernels.cross_entropy(
                logits,
                targets[rows],
                None if mask is None else mask[rows],
                tp,
                None if scratch is None else scratch[: len(logits)],
            ).sum()
            if grad_tokens is not None and grad_weight is not None:
                grad = logits  # by now
                torch.mm(grad, weight, out=grad_tokens[rows])
                add_product(grad_weight, grad.t(), tokens[rows], beta=int(start > 0), scratch=part)
        count = len(tokens) if mask is None else mask.sum().clamp(min=1)
        ctx.save_for_backward(grad_tokens, grad_weight, weight if with_gradients else None)
        ctx.count, ctx.tp, ctx.shape = count, tp, whole.shape
        return total / count

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_tokens, grad_weight, weight = ctx.saved_tensors
        factor = grads[0] / ctx.count
        reducing = ctx.tp.start_reduce((grad_tokens * factor.to(grad_tokens.dtype)).view(ctx.shape))
        grad = add_to_main_grad(weight, grad_weight, factor)
        return reducing.wait(), grad, None, None, None, None, None
