"""Gradients of weight matrices, straight into fp32 sums where an optimizer keeps such.

Autograd would make a gradient in the weight's dtype, which the optimizer then reads again to add it to its
fp32 sum over the micro-batches of a step. Where a weight carries that sum as `main_grad` (megatron-core's
name), the product is added to it and autograd gets no gradient, so that no hook of DeepSpeed fires.
"""

from torch import Tensor


def weight_grad(grad: Tensor, x: Tensor, weight: Tensor) -> Tensor | None:
    """Gradient of `weight` [o, i] from that of its output, grad [s, b, o], and its input x [s, b, i].

    None where it was added to the weight's `main_grad`.
    """
    return grad.flatten(0, 1).t() @ x.flatten(0, 1)


def add_to_main_grad(weight: Tensor, gradient: Tensor, factor: Tensor) -> Tensor | None:
    """Gradient `factor * gradient` of `weight`, from fp32 or wider of its shape, in the weight's dtype.

    None where it was added to the weight's `main_grad`. `factor` is a scalar; `gradient` is overwritten.
    """
    if not hasattr(weight, "main_grad"):
        return gradient.mul_(factor).to(weight.dtype)
    weight.main_grad.addcmul_(gradient, factor)
    return None
