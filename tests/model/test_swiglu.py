import pytest
import torch
from torch import Tensor

from llama_mcore.model.swiglu import swiglu, swiglu_backward
from tests.model.building import random_tensor
from tests.model.pairs import check_pair


def written_out(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.tensor_split(2, dim=-1)
    return gate / (1 + torch.exp(-gate)) * up


@pytest.mark.parametrize("shape", [(1, 1, 2), (3, 2, 10), (5, 14)])
def test_pair(shape: tuple[int, ...]) -> None:
    check_pair(swiglu, swiglu_backward, [random_tensor(*shape)], plain=written_out)


def test_far_from_zero() -> None:
    """silu is 0 far below zero and the identity far above, without overflow in the exponential."""
    gate_up = torch.tensor([-1000.0, 1000.0, 3.0, 3.0])
    assert swiglu(gate_up).tolist() == [0, 3000]
    assert swiglu_backward(torch.ones(2), gate_up).tolist() == [0, 3, 0, 1000]
