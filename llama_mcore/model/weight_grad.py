"""Gradients of weight matrices, straight into fp32 sums where an optimizer keeps such.

Autograd would make a gradient in the weight's dtype, which the optimizer then reads again to add it to its
fp32 sum over the micro-batches of a step. Where a weight has such a sum, its gradient is added to it here, on
a GPU by the GEMM itself, and autograd gets None. Attributes of a weight:

    main_grad             the sum, fp32 of the weight's shape (megatron-core's name)
    overwrite_main_grad   true until the first gradient of a step, which overwrites the sum: nothing has to
                          zero it (TransformerEngine's name)
    grad_bucket           in place of both: a `GradBucket`
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor


class GradBucket(Protocol):
    """Place of gradients that are summed over ranks after each micro-batch."""

    def place(self, weight: Any) -> Tensor:
        """fp32 tensor of the weight's shape that its gradient is to overwrite."""

    def filled(self, weight: Any) -> None:
        """Take what is in `place` as the weight's gradient in this micro-batch."""


def weight_grad(grad: Tensor, x: Tensor, weight: Tensor) -> Tensor | None:
    """Gradient of `weight` [o, i] from that of its output, grad [s, b, o], and its input x [s, b, i].

    None where it was added to the weight's sum.
    """
    grad, x = grad.flatten(0, 1).t(), x.flatten(0, 1)
    if not _has_sum(weight):
        return grad @ x
    _add(weight, lambda total, beta: add_product(total, grad, x, beta))
    return None


def add_to_main_grad(weight: Tensor, gradient: Tensor, factor: Tensor) -> Tensor | None:
    """Gradient `factor * gradient` of `weight`, from fp32 or wider of its shape, in the weight's dtype.

    None where it was added to the weight's sum. `factor` is a scalar; `gradient` is overwritten.
    """
    if not _has_sum(weight):
        return gradient.mul_(factor).to(weight.dtype)
    _add(
        weight,
        lambda total, beta: (
            total.addcmul_(gradient, factor) if beta else torch.mul(gradient, factor, out=total)
        ),
    )
    return None


def add_gradient(weight: Tensor, gradient: Tensor) -> None:
    """Add a gradient that autograd made, of any dtype, to the weight's `main_grad`."""
    _add(weight, lambda total, beta: total.add_(gradient) if beta else total.copy_(gradient))


def _has_sum(weight: Any) -> bool:
    return hasattr(weight, "main_grad") or hasattr(weight, "grad_bucket")


def _add(weight: Any, write: Callable[[Tensor, int], object]) -> None:
    """Call write(total, beta), which sets the weight's sum to beta * total + its gradient; beta is 0 or 1."""
    if hasattr(weight, "grad_bucket"):
        write(weight.grad_bucket.place(weight), 0)
        weight.grad_bucket.filled(weight)
        return
    write(weight.main_grad, 0 if getattr(weight, "overwrite_main_grad", False) else 1)
    weight.overwrite_main_grad = False


def add_product(total: Tensor, a: Tensor, b: Tensor, beta: int, scratch: Tensor | None = None) -> None:
    """total [o, i] = beta * total + a [o, t] @ b [t, i], by the GEMM itself where it adds in that dtype.

    beta is 0 or 1; what 0 overwrites may be NaN. `scratch` [o, i] in a's dtype holds the product where the
    GEMM cannot: on a CPU, if total is wider.
    """
    if total.dtype == a.dtype:
        torch.addmm(total, a, b, beta=beta, out=total)
    elif not total.is_cpu:
        torch.addmm(total, a, b, out_dtype=total.dtype, beta=beta, out=total)
    else:
        product = torch.mm(a, b, out=scratch)
        total.add_(product) if beta else total.copy_(product)
