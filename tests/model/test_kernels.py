"""Kernels by name: all give the numbers of the plain functions."""

import logging
import os
import shutil
import sys
from collections.abc import Iterator
from io import StringIO
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from llama_mcore.distributed.tp_comm import TensorParallel
from llama_mcore.errors import ConfigError
from llama_mcore.model import kernels
from llama_mcore.model.kernels import PLAIN, Kernels, kernels_for, load_kernels, missing_for_compile
from llama_mcore.model.rope import rope_table
from tests.support.errors import refused
from tests.support.world import run_ranks

CPU = torch.device("cpu")
compiles = pytest.mark.skipif(
    shutil.which("c++") is None or " " in sys.prefix,
    reason="on a CPU torch.compile needs a compiler, and hands it paths that may hold no space",
)


@pytest.fixture(autouse=True)
def _chosen_anew() -> Iterator[None]:
    """The choice is kept, and tests differ in the device."""
    load_kernels.cache_clear()
    yield
    load_kernels.cache_clear()


def answers(kernels: Kernels, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, grad, q, k, v, qkv, gate_up = (
        torch.randn(6, 2, *shape, generator=generator).to(device, dtype)
        for shape in ((32,), (32,), (4, 8), (2, 8), (2, 8), (64,), (64,))
    )
    weight, q_norm, k_norm = (
        torch.rand(width, generator=generator).to(device, dtype) + 0.5 for width in (32, 8, 8)
    )
    cos, sin = rope_table(6, 8, 10000.0, device)
    heads = cos, sin, 2
    qk_norms = q_norm, k_norm, 1e-6
    return [
        kernels.rmsnorm(x, weight, 1e-6),
        *kernels.rmsnorm_backward(grad, x, weight, 1e-6),
        *kernels.rmsnorm_backward(grad, x, weight, 1e-6, x),
        kernels.rope(q, cos, sin),
        *kernels.rotated_qkv(qkv, *heads),
        *kernels.rotated_qkv(qkv, *heads, *qk_norms),
        kernels.rotated_qkv_backward(q, k, v, qkv, *heads)[0],
        *kernels.rotated_qkv_backward(q, k, v, qkv, *heads, *qk_norms),
        kernels.swiglu(gate_up),
        kernels.swiglu_backward(grad, gate_up),
        *cross_entropies(kernels, gate_up.flatten(0, 1)),
    ]


class Ranks(TensorParallel):
    """The first rank of a group in which all have the same."""

    def __init__(self, size: int) -> None:
        self.rank, self.size = 0, size

    def gather_each(self, x: Tensor) -> Tensor:
        return x.expand(self.size, *x.shape)


def cross_entropies(kernels: Kernels, logits: Tensor) -> list[Tensor]:
    """Losses and gradients: of the whole vocabulary without and with a mask, and of one rank's part of it."""
    targets = torch.arange(len(logits), device=logits.device) * 5
    mask = (targets % 3 > 0).float()
    alone, first_of_two = (Ranks(size) for size in (1, 2))
    found = []
    for ids, masked, tp in (
        (targets, None, alone),
        (targets, mask, alone),
        (targets + 20, mask, first_of_two),
    ):
        chunk = logits.clone()
        found += [kernels.cross_entropy(chunk, ids, masked, tp), chunk]
    return found


def test_the_cpu_takes_the_plain_functions() -> None:
    assert kernels_for("auto").name == "plain"
    assert load_kernels("plain") is PLAIN


# on a GPU, programs found, packages found -> what auto takes, or what lacks
GPU_TOOLS = [
    (["gcc"], ["triton"], "compile", ""),
    (["clang"], ["triton"], "compile", ""),
    ([], ["triton"], "plain", "C compiler"),
    (["gcc"], [], "plain", "triton"),
]


@pytest.mark.parametrize(("programs", "packages", "name", "lacks"), GPU_TOOLS)
def test_a_gpu_takes_compiled_functions_where_they_can_be_compiled(
    monkeypatch: pytest.MonkeyPatch, programs: list[str], packages: list[str], name: str, lacks: str
) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(kernels, "on_gpu", lambda: True)
    monkeypatch.setattr(shutil, "which", lambda program: program if program in programs else None)
    monkeypatch.setattr(kernels, "find_spec", lambda package: package if package in packages else None)
    chosen = kernels_for("auto")
    assert chosen.name == name
    assert lacks in chosen.reason
    if lacks:
        with refused(ConfigError, "model.kernels", "compile") as caught:
            kernels_for("compile")
        assert lacks in caught.value.problems[0].reason


def test_the_compiler_that_a_variable_names_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/opt/mine/c++")
    monkeypatch.setattr(sys, "prefix", "/opt/environment")
    monkeypatch.setattr(shutil, "which", lambda program: program if program == "/opt/mine/c++" else None)
    assert missing_for_compile() == ""
    monkeypatch.delenv("CXX")
    assert "C++ compiler" in missing_for_compile()


def test_a_path_with_a_space_is_more_than_inductor_can_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda program: program)
    monkeypatch.setattr(sys, "prefix", "/opt/my environment")
    with refused(ConfigError, "model.kernels", "compile") as caught:
        kernels_for("compile")
    assert "/opt/my environment" in caught.value.problems[0].reason


def test_the_gpus_of_a_node_share_what_triton_compiles(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_CACHE_DIR", "asked for")
    load_kernels("compile")
    assert os.environ["TRITON_CACHE_DIR"] == "asked for"
    load_kernels.cache_clear()
    monkeypatch.delenv("TRITON_CACHE_DIR")
    load_kernels("compile")
    assert os.environ["TRITON_CACHE_DIR"] == str(tmp_path / "triton")


def compilations(inputs: list[Tensor]) -> tuple[int, str]:
    """Number of compilations of one function for all of these, and torch's output meanwhile."""
    said = StringIO()
    logging.getLogger("torch._dynamo").addHandler(logging.StreamHandler(said))
    function = load_kernels("compile").swiglu
    for x in inputs:
        torch.testing.assert_close(function(x), PLAIN.swiglu(x))
    return counters["stats"]["unique_graphs"], said.getvalue()


@pytest.mark.process
@compiles
def test_the_second_length_is_compiled_for_any() -> None:
    assert run_ranks(1, compilations, [torch.randn(length, 2, 32) for length in range(5, 45)]) == [(2, "")]


@pytest.mark.process
@compiles
def test_compilations_of_a_function_are_bounded_and_it_is_said() -> None:
    kinds = product(
        [torch.float64, torch.float32, torch.bfloat16], [(3, 4), (3, 2, 4), (2, 3, 2, 4), (2, 1, 3, 2, 4)]
    )
    ((count, said),) = run_ranks(1, compilations, [torch.ones(shape, dtype=dtype) for dtype, shape in kinds])
    assert count == 8
    assert "recompile_limit" in said


@pytest.mark.process
@compiles
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_functions_agree(dtype: torch.dtype) -> None:
    check(load_kernels("compile"), dtype, CPU)


@pytest.mark.gpu
@pytest.mark.process
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_takes_compiled_functions_which_agree(gpu: torch.device, dtype: torch.dtype) -> None:
    check(load_kernels(kernels_for("auto").name), dtype, gpu)


def check(compiled: Kernels, dtype: torch.dtype, device: torch.device) -> None:
    """Fusing drops roundings between operations: two units in the last place of the largest value."""
    assert compiled.rmsnorm is not PLAIN.rmsnorm
    for found, expected in zip(answers(compiled, dtype, device), answers(PLAIN, dtype, device), strict=True):
        bound = 2 * torch.finfo(dtype).eps * expected.abs().max().item()
        torch.testing.assert_close(found, expected, rtol=0, atol=bound)


def test_apex_is_refused_where_it_cannot_run() -> None:
    with refused(ConfigError, "model.kernels", "apex"):
        kernels_for("apex")
