"""Kernels by name: all give the numbers of the plain functions."""

import shutil
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from llama_mcore.errors import ConfigError
from llama_mcore.model.kernels import PLAIN, Kernels, choose_kernels
from llama_mcore.model.rope import rope_table
from tests.support.errors import refused

CPU = torch.device("cpu")
COMPILES = shutil.which("c++") is not None and " " not in sys.prefix


@pytest.fixture(autouse=True)
def _chosen_anew() -> Iterator[None]:
    """The choice is kept, and tests differ in the device."""
    choose_kernels.cache_clear()
    yield
    choose_kernels.cache_clear()


def answers(kernels: Kernels, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, grad, heads, gate_up = (
        torch.randn(*shape, generator=generator).to(device, dtype)
        for shape in ((6, 2, 32), (6, 2, 32), (6, 2, 4, 8), (6, 2, 64))
    )
    weight = torch.rand(32, generator=generator).to(device, dtype) + 0.5
    cos, sin = rope_table(6, 8, 10000.0, device)
    return [
        kernels.rmsnorm(x, weight, 1e-6),
        *kernels.rmsnorm_backward(grad, x, weight, 1e-6),
        kernels.rope(heads, cos, sin),
        kernels.rope_backward(heads, cos, sin),
        kernels.swiglu(gate_up),
        kernels.swiglu_backward(grad, gate_up),
    ]


def test_the_cpu_takes_the_plain_functions() -> None:
    assert choose_kernels("auto") is PLAIN
    assert choose_kernels("plain") is PLAIN


@pytest.mark.process
@pytest.mark.skipif(
    not COMPILES, reason="on a CPU torch.compile needs a compiler, and hands it paths that may hold no space"
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_functions_agree(dtype: torch.dtype) -> None:
    check(choose_kernels("compile"), dtype, CPU)


@pytest.mark.gpu
@pytest.mark.process
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_takes_compiled_functions_which_agree(gpu: torch.device, dtype: torch.dtype) -> None:
    check(choose_kernels("auto"), dtype, gpu)


def check(compiled: Kernels, dtype: torch.dtype, device: torch.device) -> None:
    """Fusing drops roundings between operations: two units in the last place of the largest value."""
    assert compiled.rmsnorm is not PLAIN.rmsnorm
    for found, expected in zip(answers(compiled, dtype, device), answers(PLAIN, dtype, device), strict=True):
        bound = 2 * torch.finfo(dtype).eps * expected.abs().max().item()
        torch.testing.assert_close(found, expected, rtol=0, atol=bound)


def test_apex_is_refused_where_it_cannot_run() -> None:
    with refused(ConfigError, "model.kernels", "apex"):
        choose_kernels("apex")
