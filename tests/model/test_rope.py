import math

import pytest
import torch
from torch import Tensor

from llama_mcore.model.config import RopeScaling
from llama_mcore.model.rope import rope, rope_backward, rope_table
from tests.model import paper
from tests.model.building import EXACT, error, random_tensor
from tests.model.pairs import check_pair

CPU = torch.device("cpu")


def table(length: int, width: int, scaling: RopeScaling | None = None) -> tuple[Tensor, Tensor]:
    return rope_table(length, width, 10000.0, CPU, scaling=scaling, dtype=torch.float64)


@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (5, 2, 3, 6), (7, 1, 1, 4)])
def test_pair(shape: tuple[int, ...]) -> None:
    cos, sin = table(shape[0], shape[-1])
    check_pair(
        lambda x: rope(x, cos, sin), lambda grad, _: rope_backward(grad, cos, sin), [random_tensor(*shape)]
    )


@pytest.mark.parametrize(("length", "width"), [(1, 4), (2048, 6)])
def test_it_is_the_papers_rotation_with_other_pairs(length: int, width: int) -> None:
    x = random_tensor(length, 2, 3, width)
    neighbours = x.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
    expected = paper.rotated(
        neighbours.transpose(0, 1), paper.rotation_speeds(neighbours.size(-1), 10000.0)
    ).transpose(0, 1)
    found = rope(x, *table(length, width)).unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
    assert error(found, expected) < EXACT


def test_scores_depend_on_the_distance_alone() -> None:
    q, k = (
        random_tensor(1, 1, 1, 8).expand(40, 1, 1, 8),
        random_tensor(1, 1, 1, 8, seed=2).expand(40, 1, 1, 8),
    )
    cos, sin = table(40, 8)
    scores = rope(q, cos, sin)[:, 0, 0] @ rope(k, cos, sin)[:, 0, 0].T
    for distance in (-39, -5, 0, 17):
        diagonal = scores.diagonal(distance)
        assert error(diagonal, diagonal[:1].expand_as(diagonal)) < EXACT


def test_bf16_is_rotated_in_fp32() -> None:
    x = random_tensor(2048, 1, 1, 8).bfloat16()
    found = rope(x, *rope_table(2048, 8, 10000.0, CPU))
    expected = rope(x.double(), *table(2048, 8))
    assert found.dtype == torch.bfloat16
    # rounded once to 8 bits, from fp32 whose own error is 2^-16 of that
    assert ((found - expected).abs() <= 1.001 * 2**-8 * expected.abs() + 1e-6).all()


def test_angles_far_out_are_exact() -> None:
    """An fp32 angle is off by 4e-3 at position 2^17."""
    cos, sin = rope_table(2**17 + 1, 2, 10000.0, CPU)
    assert cos[-1, 0, 0].tolist() == pytest.approx([math.cos(2**17)] * 2, abs=1e-7)
    assert sin[-1, 0, 0].tolist() == pytest.approx([-math.sin(2**17), math.sin(2**17)], abs=1e-7)


def test_llama3_scaling_as_released() -> None:
    """`apply_scaling` of Meta's llama-models, frequency by frequency: wavelengths shorter than
    old_context / high stay, longer than old_context / low are divided, between them a blend."""
    width, length = 64, 3
    scaling = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_seq_length=512)
    cos, sin = table(length, width, scaling)
    kinds = set()
    for channel in range(width // 2):
        frequency = 10000.0 ** (-2 * channel / width)
        wavelength = 2 * math.pi / frequency
        if wavelength < 512 / 4:
            kinds.add("kept")
        elif wavelength > 512:
            kinds.add("divided")
            frequency /= 8
        else:
            kinds.add("blended")
            smooth = (512 / wavelength - 1) / (4 - 1)
            frequency = (1 - smooth) * frequency / 8 + smooth * frequency
        for position in range(length):
            assert cos[position, 0, 0, channel].item() == pytest.approx(
                math.cos(position * frequency), rel=1e-12
            )
            assert sin[position, 0, 0, width // 2 + channel].item() == pytest.approx(
                math.sin(position * frequency), rel=1e-12
            )
    assert kinds == {"kept", "divided", "blended"}
