"""llama_mcore.benchmark.memory: bytes that autograd keeps."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from llama_mcore.benchmark.memory import kept_bytes

FLOATS = 1000
WEIGHT = torch.ones(FLOATS, requires_grad=True)


def kept(forward: Any, x: Tensor | None = None) -> int:
    x = torch.ones(FLOATS, requires_grad=True) if x is None else x
    count, answer = kept_bytes(lambda: forward(x), [WEIGHT])
    answer.backward()
    assert x.grad is not None
    return count


def test_what_a_backward_needs() -> None:
    # exp keeps its answer, a product both factors, a sum nothing
    assert kept(lambda x: x.exp().sum()) == 4 * FLOATS
    assert kept(lambda x: (x.exp() * x.cos()).sum()) == 4 * 3 * FLOATS
    assert kept(lambda x: (x + x).sum()) == 0


def test_a_storage_counts_once_and_whole() -> None:
    assert kept(lambda x: (x * x.view(10, 100).view(-1) * x).sum()) == 4 * 2 * FLOATS
    # half of exp's answer keeps all of it
    assert kept(lambda x: x.exp()[: FLOATS // 2].sin().sum()) == 4 * FLOATS


def test_parameters_do_not_count() -> None:
    assert kept(lambda x: (x.exp() * WEIGHT).sum()) == 4 * FLOATS


def test_what_a_function_saves_counts() -> None:
    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x * x)
            return x**3

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Tensor:
            return 3 * ctx.saved_tensors[0] * grads[0]

    assert kept(lambda x: Cube.apply(x).sum()) == 4 * FLOATS


def test_what_is_recomputed_does_not_count() -> None:
    def inner(x: Tensor) -> Tensor:
        return (x.exp() * x.cos()).sin()

    assert kept(lambda x: inner(x).sum()) == 4 * 4 * FLOATS
    assert kept(lambda x: checkpoint(inner, x, use_reentrant=True).sum()) == 4 * FLOATS


def test_what_is_gone_by_the_end_does_not_count() -> None:
    def forward(x: Tensor) -> Tensor:
        (x.exp() * x.exp()).sum()  # a graph that nothing holds
        return x.exp().sum()

    assert kept(forward) == 4 * FLOATS
