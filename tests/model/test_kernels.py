"""Kernels by name: all give the numbers of the plain functions."""

import shutil
import sys

import pytest
import torch
from torch import Tensor

from llama_mcore.errors import ConfigError
from llama_mcore.model.kernels import PLAIN, Kernels, choose_kernels
from llama_mcore.model.rope import rope_table

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")


def answers(kernels: Kernels, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, grad, heads, gate_up = (
        torch.randn(*shape, generator=generator).to(DEVICE, dtype)
        for shape in ((6, 2, 32), (6, 2, 32), (6, 2, 4, 8), (6, 2, 64))
    )
    weight = torch.rand(32, generator=generator).to(DEVICE, dtype) + 0.5
    cos, sin = rope_table(6, 8, 10000.0, DEVICE)
    return [
        kernels.rmsnorm(x, weight, 1e-6),
        *kernels.rmsnorm_backward(grad, x, weight, 1e-6),
        kernels.rope(heads, cos, sin),
        kernels.rope_backward(heads, cos, sin),
        kernels.swiglu(gate_up),
        kernels.swiglu_backward(grad, gate_up),
    ]


def test_the_cpu_takes_the_plain_functions() -> None:
    assert (choose_kernels("auto") is PLAIN) == (not GPU)
    assert choose_kernels("plain") is PLAIN


@pytest.mark.skipif(
    not GPU and (shutil.which("c++") is None or " " in sys.prefix),
    reason="on a CPU torch.compile needs a compiler, and hands it paths that may hold no space",
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_functions_agree(dtype: torch.dtype) -> None:
    """Fusing drops roundings between operations: two units in the last place of the largest value."""
    compiled = choose_kernels("compile")
    assert compiled.rmsnorm is not PLAIN.rmsnorm
    for found, expected in zip(answers(compiled, dtype), answers(PLAIN, dtype), strict=True):
        bound = 2 * torch.finfo(dtype).eps * expected.abs().max().item()
        torch.testing.assert_close(found, expected, rtol=0, atol=bound)


@pytest.mark.skipif(GPU, reason="shows what a machine without a GPU says")
def test_apex_is_refused_where_it_cannot_run() -> None:
    with pytest.raises(ConfigError, match=r"model.kernels = apex: needs a GPU"):
        choose_kernels("apex")
