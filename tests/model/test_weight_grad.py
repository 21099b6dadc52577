"""llama_mcore.model.weight_grad: gradients of a weight in its fp32 sum, its bucket, or autograd's hands."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from llama_mcore.model.weight_grad import add_gradient, add_to_main_grad, weight_grad

DTYPES = [torch.bfloat16, torch.float32, torch.float64]


def parts(dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, nn.Parameter]:
    """Gradient [s, b, o], input [s, b, i] and weight [o, i]."""
    generator = torch.Generator().manual_seed(seed)
    grad, x, weight = (torch.randn(*size, generator=generator) for size in ((5, 2, 6), (5, 2, 4), (6, 4)))
    return grad.to(dtype), x.to(dtype), nn.Parameter(weight.to(dtype))


def product(grad: Tensor, x: Tensor) -> Tensor:
    return torch.einsum("sbo,sbi->oi", grad, x)


def with_sum(weight: nn.Parameter, value: float, overwrite: bool) -> Tensor:
    """The weight's sum, all of it `value`."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    weight.main_grad = torch.full(weight.shape, value, dtype=wide)  # type: ignore[assignment]
    weight.overwrite_main_grad = overwrite  # type: ignore[assignment]
    return weight.main_grad  # type: ignore[return-value]


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_a_sum_it_is_autograds(dtype: torch.dtype) -> None:
    grad, x, weight = parts(dtype)
    found = weight_grad(grad, x, weight)
    assert found is not None
    torch.testing.assert_close(found, product(grad, x))
    scaled = add_to_main_grad(weight, torch.ones(6, 4), torch.tensor(0.5))
    assert scaled is not None
    assert torch.equal(scaled, torch.full((6, 4), 0.5, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_first_gradient_overwrites_the_sum_and_others_add(dtype: torch.dtype) -> None:
    """Whatever the sum held before, NaN too."""
    grad, x, weight = parts(dtype)
    total = with_sum(weight, torch.nan, overwrite=True)
    assert weight_grad(grad, x, weight) is None
    expected = product(grad, x).to(total.dtype)
    torch.testing.assert_close(total, expected)
    assert weight_grad(grad, x, weight) is None
    torch.testing.assert_close(total, 2 * expected)


@pytest.mark.parametrize("overwrite", [True, False])
def test_gradients_of_other_kinds_do_so_too(overwrite: bool) -> None:
    """Gradients of the loss, in fp32 and without its factor, and those that autograd made."""
    gradient, before = torch.rand(6, 4), 0.0 if overwrite else 3.0
    _, _, weight = parts(torch.bfloat16)
    total = with_sum(weight, torch.nan if overwrite else before, overwrite)
    assert add_to_main_grad(weight, gradient, torch.tensor(0.5)) is None
    torch.testing.assert_close(total, before + 0.5 * gradient)
    total = with_sum(weight, torch.nan if overwrite else before, overwrite)
    add_gradient(weight, gradient.bfloat16())
    torch.testing.assert_close(total, before + gradient.bfloat16().float())


def test_a_weight_with_a_bucket_fills_it_once() -> None:
    class Bucket:
        def __init__(self) -> None:
            self.filled_by: list[nn.Parameter] = []

        def place(self, weight: nn.Parameter) -> Tensor:
            self.values = torch.full(weight.shape, torch.nan)
            return self.values

        def filled(self, weight: nn.Parameter) -> None:
            self.filled_by.append(weight)

    grad, x, weight = parts(torch.bfloat16)
    bucket = weight.grad_bucket = Bucket()  # type: ignore[assignment]
    assert weight_grad(grad, x, weight) is None
    torch.testing.assert_close(bucket.values, product(grad, x).float())
    assert bucket.filled_by == [weight]


class Kernels(TorchDispatchMode):
    """Notes which of torch's operators are called."""

    def __init__(self) -> None:
        super().__init__()
        self.called: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.called.append(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("overwrite", [True, False])
def test_where_the_gemm_can_it_adds_to_the_fp32_sum(overwrite: bool) -> None:
    """Tensors without memory stand for a GPU's: only the CPU's GEMM cannot."""
    grad, x, weight = (part.detach().to("meta") for part in parts(torch.bfloat16))
    weight.main_grad = torch.empty(weight.shape, device="meta")
    weight.overwrite_main_grad = overwrite
    with Kernels() as kernels:
        assert weight_grad(grad, x, weight) is None
    views = {torch.ops.aten.view.default, torch.ops.aten.t.default}
    assert [func for func in kernels.called if func not in views] == [torch.ops.aten.addmm.dtype_out]
