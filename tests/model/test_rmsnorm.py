import pytest
import torch

from llama_mcore.model.rmsnorm import rmsnorm, rmsnorm_backward
from tests.model import paper
from tests.model.building import random_tensor
from tests.model.pairs import check_pair


@pytest.mark.parametrize("eps", [1e-6, 0.3])
@pytest.mark.parametrize("shape", [(1, 1, 7), (3, 2, 5), (4, 1, 1)])
def test_pair(shape: tuple[int, ...], eps: float) -> None:
    def forward(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return rmsnorm(x, weight, eps)

    def backward(grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return rmsnorm_backward(grad, x, weight, eps)

    inputs = [random_tensor(*shape), random_tensor(shape[-1], seed=2)]
    check_pair(forward, backward, inputs, plain=lambda x, weight: paper.norm(x, weight, eps))


def test_bf16_keeps_fp32_statistics() -> None:
    """The square of 300 overflows nothing, but in bf16 the mean of 4096 of them would be off by percents."""
    x, weight = (300 + random_tensor(4, 1, 4096)).bfloat16(), torch.ones(4096, dtype=torch.bfloat16)
    found, expected = rmsnorm(x, weight, 1e-6), paper.norm(x.double(), weight.double(), 1e-6)
    assert found.dtype == torch.bfloat16
    # one rounding to 8 bits
    assert ((found.double() - expected) / expected).abs().max() <= 2**-8
    grads = rmsnorm_backward(x, x, weight, 1e-6)
    assert [grad.dtype for grad in grads] == [torch.bfloat16] * 2
