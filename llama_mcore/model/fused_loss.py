"""Cross-entropy fused with the output projection, vocabulary-parallel and in chunks of tokens.

    T tokens of the micro-batch (s * b), c tokens of one chunk, h hidden, v vocabulary of this rank

The logits are the largest tensor of a small model: T * v in fp32, and as much again for their gradient.
Here the logits of a chunk give its losses and its part of both gradients at once, and are then dropped. That
works because the loss is a mean: its gradient is known up to one factor, which the backward multiplies in.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from llama_mcore.distributed.tp_comm import TensorParallel

CHUNK_BYTES = 64 * 2**20
"""fp32 logits of one chunk: large enough for an efficient GEMM, small beside the activations of a layer."""


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, loss_mask: Tensor | None, tp: TensorParallel
) -> Tensor:
    """Mean loss in nats, a scalar in fp32 or wider, over the tokens where `loss_mask` is 1.

    hidden [s, b, h] (s/tp under sequence parallelism), weight [v, h] this rank's rows, labels [b, s] int64,
    loss_mask [b, s] or None for all. Runs an all-gather of hidden under sequence parallelism and two small
    all-reduces per chunk; the backward reduces the gradient of hidden.
    """
    return _LinearCrossEntropy.apply(hidden, weight, labels, loss_mask, tp, torch.is_grad_enabled())


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        loss_mask: Tensor | None,
        tp: TensorParallel,
        with_gradients: bool,
    ) -> Tensor:
        whole = tp.start_gather(hidden).wait()  # [s, b, h]
        tokens = whole.flatten(0, 1)  # [T, h]
        targets = labels.t().reshape(-1)  # [T], in the order of `tokens`
        mask = None if loss_mask is None else loss_mask.t().reshape(-1)
        wide = torch.promote_types(weight.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=weight.device)
        grad_tokens = torch.empty_like(tokens) if with_gradients else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if with_gradients else None
        # Large fresh memory costs more than what is computed in it: every chunk uses the same.
        size = min(len(tokens), max(1, CHUNK_BYTES // (4 * len(weight))))
        all_logits = tokens.new_empty(size, len(weight))
        all_probabilities = torch.empty_like(all_logits, dtype=wide)
        part = torch.empty_like(weight) if with_gradients else None
        for start in range(0, len(tokens), size):
            rows = slice(start, min(start + size, len(tokens)))
            logits = torch.mm(tokens[rows], weight.t(), out=all_logits[: rows.stop - start])  # [c, v]
            losses, grad = _losses_and_grad(logits, targets[rows], all_probabilities[: len(logits)], tp)
            if mask is not None:
                losses = losses * mask[rows]
                grad *= mask[rows, None]
            total += losses.sum()
            if grad_tokens is not None and grad_weight is not None:
                narrow = logits.copy_(grad)
                torch.mm(narrow, weight, out=grad_tokens[rows])
                grad_weight.add_(torch.mm(narrow.t(), tokens[rows], out=part))
        count = len(tokens) if mask is None else mask.sum().clamp(min=1)
        ctx.save_for_backward(grad_tokens, grad_weight)
        ctx.count, ctx.tp, ctx.shape, ctx.dtype = count, tp, whole.shape, weight.dtype
        return total / count

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_tokens, grad_weight = ctx.saved_tensors
        factor = grads[0] / ctx.count
        reducing = ctx.tp.start_reduce((grad_tokens * factor.to(grad_tokens.dtype)).view(ctx.shape))
        scaled = grad_weight.mul_(factor).to(ctx.dtype)
        return reducing.wait(), scaled, None, None, None, None


def _losses_and_grad(
    logits: Tensor, targets: Tensor, out: Tensor, tp: TensorParallel
) -> tuple[Tensor, Tensor]:
    """Loss of each token [c] and, in `out`, the gradient of their sum by this rank's logits [c, v]."""
    wide = out.dtype
    largest, where = logits.max(-1, keepdim=True)
    probabilities = torch.softmax(logits, -1, dtype=wide, out=out)
    # The largest probability is at least 1/v, so its logarithm is exact enough: no second pass of exp.
    lse = (largest.to(wide) - probabilities.gather(1, where).log())[:, 0]
    local = targets - tp.rank * logits.size(1)
    here = (local >= 0) & (local < logits.size(1))  # whose target lies in this rank's rows
    index = local.clamp(0, logits.size(1) - 1)[:, None]
    target_logits = logits.gather(1, index)[:, 0].to(wide)
    if tp.size > 1:
        # softmax normalised over this rank's rows; what is missing is the sum over all ranks.
        local_lse, lse = lse, _log_sum_exp_over_ranks(lse, tp)
        probabilities.mul_((local_lse - lse).exp()[:, None])
        target_logits = torch.where(here, target_logits, 0)
        dist.all_reduce(target_logits, group=tp.group)
    probabilities.scatter_add_(1, index, -here[:, None].to(wide))
    return lse - target_logits, probabilities


def _log_sum_exp_over_ranks(local_lse: Tensor, tp: TensorParallel) -> Tensor:
    """Log-sum-exp over all ranks' rows, [c] -> [c]; all-gathers one number per token."""
    every = local_lse.new_empty(tp.size * len(local_lse))
    dist.all_gather_into_tensor(every, local_lse, group=tp.group)
    return every.view(tp.size, -1).logsumexp(0)
