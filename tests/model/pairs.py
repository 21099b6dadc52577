"""Forward/backward pairs of pure functions, held against numeric derivatives and against autograd."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import gradcheck

from tests.model.building import EXACT, error, random_tensor

Outputs = Tensor | tuple[Tensor, ...]


def check_pair(
    forward: Callable[..., Outputs],
    backward: Callable[..., Outputs],
    inputs: Sequence[Tensor],
    plain: Callable[..., Outputs] | None = None,
) -> None:
    """`backward(*output_grads, *inputs)` gives the derivative of `forward(*inputs)` that finite differences
    give, and both agree with autograd through `plain` (default: through `forward` itself)."""
    pair = as_function(forward, backward)
    inputs = [tensor.clone().requires_grad_() for tensor in inputs]
    assert gradcheck(pair, inputs)
    found, expected = (outputs_and_grads(function, inputs) for function in (pair, plain or forward))
    for mine, theirs in zip(found, expected, strict=True):
        assert_close(mine, theirs)


def as_function(forward: Callable[..., Outputs], backward: Callable[..., Outputs]) -> Callable[..., Outputs]:
    class Pair(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Tensor) -> Outputs:
            ctx.save_for_backward(*inputs)
            return forward(*inputs)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Outputs:
            return backward(*grads, *ctx.saved_tensors)

    return Pair.apply


def outputs_and_grads(function: Callable[..., Outputs], inputs: Sequence[Tensor]) -> list[Tensor]:
    """Outputs, then the gradient of each input under fixed random output gradients."""
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    grads = [random_tensor(*output.shape, seed=seed) for seed, output in enumerate(outputs, start=7)]
    return [*(output.detach() for output in outputs), *torch.autograd.grad(outputs, inputs, grads)]


def assert_close(found: Tensor, expected: Tensor) -> None:
    """Equal to float64's rounding. Gradients through softmax over one position are exactly zero."""
    if expected.abs().max() < 1e-14:
        assert found.abs().max() < 1e-14
    else:
        assert error(found, expected) < EXACT
