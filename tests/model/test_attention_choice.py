"""Choice of attention backend, as a table; and on a GPU each of them against the reference."""

from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from llama_mcore.distributed.config import ParallelConfig
from llama_mcore.errors import ConfigError
from llama_mcore.model.attention import (
    BACKENDS,
    Case,
    attention_for,
    case_of,
    cudnn_backend,
    installed_packages,
    load_backend,
)
from llama_mcore.model.attention.choice import choose_attention
from llama_mcore.model.build import construct
from llama_mcore.model.config import ATTENTION_BACKENDS
from llama_mcore.model.qkv import split_qkv
from tests.support.errors import refused
from tests.support.models import model_config

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
HOPPER, AMPERE, ADA, BLACKWELL, TURING = (9, 0), (8, 0), (8, 9), (10, 0), (7, 5)
EVERY_PACKAGE = {backend.limits.package for backend in BACKENDS.values() if backend.limits.package}
ON_HOPPER = Case(HOPPER, BF16, 128)


@pytest.mark.parametrize(
    ("case", "name", "because"),
    [
        (ON_HOPPER, "cudnn", "Hopper in bf16"),
        (Case(BLACKWELL, BF16, 128), "cudnn", "Blackwell in bf16"),
        (Case(HOPPER, FP16, 64), "cudnn", "Hopper in fp16"),
        (
            Case(AMPERE, BF16, 128),
            "flash",
            "cudnn needs a GPU of compute capability 9.0 or newer, but this one has 8.0",
        ),
        (Case(ADA, BF16, 64), "flash", "Ada in bf16"),
        (
            Case(HOPPER, BF16, 256),
            "flash",
            "cudnn supports heads of at most 128 channels on this GPU, not 256",
        ),
        (replace(ON_HOPPER, documents=True), "flash", "documents have many"),
        (replace(ON_HOPPER, deterministic=True), "flash", "cudnn does not give the same bits"),
        (replace(ON_HOPPER, manual_backward=False), "cudnn", "Hopper in bf16"),
        (Case(HOPPER, FP32, 128), "efficient", "flash has no kernel for fp32"),
        (Case(HOPPER, FP32, 128, deterministic=True, documents=True), "efficient", "Hopper in fp32"),
        (Case(HOPPER, BF16, 512), "efficient", "flash supports heads of at most 256 channels"),
        (Case(HOPPER, BF16, 100), "reference", "efficient needs a head_dim that is a multiple of 8"),
        (Case(HOPPER, FP64, 128), "reference", "efficient has no kernel for fp64"),
        (Case(TURING, FP32, 128), "efficient", "Turing in fp32"),
        (
            Case(TURING, BF16, 128),
            "reference",
            "efficient needs a GPU of compute capability 8.0 or newer, but this one has",
        ),
        (Case(ADA, BF16, 224), "efficient", "flash supports heads of at most 192 channels on this GPU"),
        (Case(ADA, BF16, 192), "flash", "Ada in bf16"),
        (Case(AMPERE, BF16, 224), "flash", "Ampere in bf16"),
        (Case(None, FP32, 128), "flash", "CPU in fp32"),
        (Case(None, BF16, 128), "flash", "CPU in bf16"),
        (Case(None, FP64, 5, documents=True, deterministic=True), "flash", "CPU in fp64"),
    ],
)
def test_auto(case: Case, name: str, because: str) -> None:
    chosen = choose_attention("auto", case, EVERY_PACKAGE)
    assert chosen.name == name
    assert because in chosen.reason


def test_what_is_asked_for_is_taken_or_refused() -> None:
    assert str(choose_attention("flash", ON_HOPPER)) == "flash (as configured)"
    assert choose_attention("te", replace(ON_HOPPER, manual_backward=False), EVERY_PACKAGE).name == "te"


@pytest.mark.parametrize(
    ("name", "case", "because"),
    [
        ("cudnn", Case(None, BF16, 64), "needs a GPU"),
        ("cudnn", Case(AMPERE, BF16, 64), "compute capability"),
        ("cudnn", replace(ON_HOPPER, documents=True), "new length"),
        ("cudnn", replace(ON_HOPPER, deterministic=True), "same bits"),
        ("flash", Case(HOPPER, FP32, 64), "fp32"),
        ("efficient", Case(None, FP32, 64), "needs a GPU"),
        ("xformers", replace(ON_HOPPER, deterministic=True), "same bits"),
        ("te", ON_HOPPER, "model.recompute=none"),
        ("flash_attn", Case(None, BF16, 64), "needs a GPU"),
    ],
)
def test_what_cannot_do_a_case_is_refused_by_name(name: str, case: Case, because: str) -> None:
    with refused(ConfigError, "model.attention", name) as caught:
        choose_attention(name, case, EVERY_PACKAGE)
    (problem,) = caught.value.problems
    assert because in problem.reason
    able = problem.remedy.rpartition(" of ")[2].split(", ")
    assert "reference" in able
    assert name not in able
    for one in able:
        choose_attention(one, case, EVERY_PACKAGE)


@pytest.mark.parametrize("name", [name for name, backend in BACKENDS.items() if backend.limits.package])
def test_a_package_that_is_not_installed_is_named(name: str) -> None:
    with refused(ConfigError, "model.attention", name) as caught:
        choose_attention(name, replace(ON_HOPPER, manual_backward=False), ())
    assert str(BACKENDS[name].limits.package) in caught.value.problems[0].reason


@pytest.mark.parametrize("capability", [None, AMPERE, HOPPER, BLACKWELL])
@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("head_dim", [64, 80, 128, 130, 256])
@pytest.mark.parametrize("flags", range(8))
def test_everything_that_the_product_computes_has_a_backend(
    capability: tuple[int, int] | None, dtype: torch.dtype, head_dim: int, flags: int
) -> None:
    case = Case(capability, dtype, head_dim, bool(flags & 1), bool(flags & 2), bool(flags & 4))
    chosen = choose_attention("auto", case)
    assert BACKENDS[chosen.name].limits.refusal(case) is None


def test_a_model_is_not_built_with_a_backend_that_cannot() -> None:
    with refused(ConfigError, "model.attention", "cudnn"):
        construct(model_config(attention="cudnn"), ParallelConfig(), torch.float32)


@pytest.mark.parametrize("attention", ["auto", "reference"])
def test_a_gpu_that_is_too_old_for_bf16_is_named(monkeypatch: pytest.MonkeyPatch, attention: str) -> None:
    monkeypatch.setattr("llama_mcore.model.attention.compute_capability", lambda: TURING)
    with refused(ConfigError, "train.precision", "bf16") as caught:
        construct(model_config(attention=attention), ParallelConfig(), BF16)
    assert "fp32" in caught.value.problems[0].remedy
    assert attention_for(model_config(), FP32).name == "efficient"


def test_the_case_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_config()
    assert case_of(model, BF16) == Case(None, BF16, model.head_dim)
    assert attention_for(model, BF16, documents=True).name == "flash"
    monkeypatch.setattr("llama_mcore.model.attention.compute_capability", lambda: HOPPER)
    torch.use_deterministic_algorithms(True)
    try:
        found = case_of(model_config(recompute="none"), FP32, documents=True)
    finally:
        torch.use_deterministic_algorithms(False)
    assert found == Case(
        HOPPER, FP32, model.head_dim, documents=True, deterministic=True, manual_backward=False
    )


def as_from_a_layer(length: int, heads: int, groups: int, width: int, **where: object) -> list[Tensor]:
    """q, k and v of two rows as `rotated_qkv` gives them: v is a view of the fused projection."""
    q, k = (torch.randn(length, 2, number, width, **where) for number in (heads, groups))
    qkv = torch.randn(length, 2, (heads + 2 * groups) * width, **where)
    return [q, k, split_qkv(qkv, heads // groups, width)[2]]


@pytest.mark.parametrize("name", ["cudnn", "flash", "efficient"])
@pytest.mark.parametrize("groups", [4, 2])
def test_torchs_gpu_operators_take_what_they_are_given(name: str, groups: int) -> None:
    """Shapes and layouts agree by torch's meta functions, which need no GPU. Nothing is copied around the
    operators, and those that want [b, s, n, d] contiguous get it; only `efficient` repeats keys."""
    q, k, v = as_from_a_layer(33, 4, groups, 64, device="meta", dtype=BF16)
    grad = torch.empty_like(q)
    backend = load_backend(name)
    with _Operators() as forward:
        out, log_sum_exp = backend.forward(q, k, v)
    assert (out.shape, out.dtype) == (q.shape, BF16)
    assert out.is_contiguous()
    assert (log_sum_exp.shape, log_sum_exp.dtype) == ((2, 4, 33), FP32)
    with _Operators() as backward:
        grads = backend.backward(grad, q, k, v, out, log_sum_exp)
    for found, x in zip(grads, (q, k, v), strict=True):
        assert (found.shape, found.dtype) == (x.shape, BF16)
        assert found.is_contiguous() or (name, groups) == ("efficient", 2)
    if (name, groups) != ("efficient", 2):
        copies = {"clone", "copy_", "contiguous", "_to_copy", "repeat_interleave", "sum"}
        assert not copies & (forward.calls.keys() | backward.calls.keys())
    (arguments,) = (found for called, found in backward.calls.items() if "attention" in called)
    grad_out, *_ = arguments
    saved_out = arguments[5 if name == "efficient" else 4]
    assert grad_out.stride() == saved_out.stride()
    assert name == "cudnn" or grad_out.transpose(1, 2).is_contiguous()


class _Operators(TorchDispatchMode):
    """Operators that were called, by name, with the arguments of the last call."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, tuple] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls[function.overloadpacket.__name__] = args
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("capability", "groups", "wrong"),
    [(HOPPER, 1, False), (HOPPER, 8, False), (BLACKWELL, 4, True), (BLACKWELL, 8, False), ((10, 3), 1, True)],
)
def test_where_cudnn_would_be_wrong_keys_are_repeated(
    capability: tuple[int, int], groups: int, wrong: bool
) -> None:
    assert cudnn_backend._goes_wrong(capability, groups) == wrong


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32, FP64], ids=str)
@pytest.mark.parametrize("length", [256, 333])
@pytest.mark.parametrize("groups", [8, 2])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("name", BACKENDS)
def test_gpu_backends_agree_with_the_reference(
    gpu: torch.device, name: str, head_dim: int, groups: int, length: int, dtype: torch.dtype
) -> None:
    """Against the reference in fp64. What a kernel keeps between its two products is rounded to the dtype,
    and so is what it gives; errors of the terms of a sum differ in sign."""
    manual_backward = BACKENDS[name].limits.manual_backward
    case = Case(torch.cuda.get_device_capability(), dtype, head_dim, manual_backward=manual_backward)
    if BACKENDS[name].limits.package not in {None, *installed_packages()}:
        pytest.skip(f"needs the package {BACKENDS[name].limits.package}")
    if reason := BACKENDS[name].limits.refusal(case):
        pytest.skip(f"{name} {reason}")
    backend, reference = load_backend(name), load_backend("reference")
    generator = torch.Generator(gpu).manual_seed(0)
    where = {"device": gpu, "dtype": dtype, "generator": generator}
    q, k, v = as_from_a_layer(length, 8, groups, head_dim, **where)
    grad = torch.randn(q.shape, **where)
    wide = [x.double() for x in (q, k, v)]
    expected, log_sum_exp = reference.forward(*wide)
    expected_grads = reference.backward(grad.double(), *wide, expected, log_sum_exp)

    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    found = backend.attend(*inputs)
    answers = [(found, torch.autograd.grad(found, inputs, grad))]
    if manual_backward:
        out, lse = backend.forward(q, k, v)
        torch.testing.assert_close(lse.double(), log_sum_exp, rtol=0, atol=16 * step(dtype))
        answers.append((out, backend.backward(grad, q, k, v, out, lse)))
    for out, grads in answers:
        for ours, theirs in zip((out, *grads), (expected, *expected_grads), strict=True):
            assert ours.dtype == dtype
            bound = 16 * step(dtype) * theirs.abs().max().item()
            torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=bound)


def step(dtype: torch.dtype) -> float:
    """Rounding step: fp32 products may be made of pieces with TF32's 10 bits, three of which keep 20."""
    return 2**-20 if dtype == FP32 else torch.finfo(dtype).eps


@pytest.mark.gpu
@pytest.mark.parametrize("name", [name for name, one in BACKENDS.items() if one.limits.deterministic])
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_what_says_so_gives_the_same_bits(gpu: torch.device, name: str, dtype: torch.dtype) -> None:
    torch.use_deterministic_algorithms(True)
    try:
        case = Case(torch.cuda.get_device_capability(), dtype, 128, deterministic=True)
        if BACKENDS[name].limits.package not in {None, *installed_packages()} or BACKENDS[
            name
        ].limits.refusal(case):
            pytest.skip(f"{name} cannot do this here")
        backend = load_backend(name)
        q, k, v, grad = (torch.randn(2048, 2, 8, 128, device=gpu, dtype=dtype) for _ in range(4))

        def once() -> tuple[Tensor, ...]:
            out, lse = backend.forward(q, k, v)
            return out, lse, *backend.backward(grad, q, k, v, out, lse)

        first = once()
        for _ in range(8):
            assert all(map(torch.equal, first, once()))
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_backend_is_known_by_its_file_alone() -> None:
    """The configuration, which loads no torch, reads names of files; the choice what stands in them."""
    assert sorted(BACKENDS) == ATTENTION_BACKENDS
    assert all(backend.about for backend in BACKENDS.values())
    asked = [backend.preference for backend in BACKENDS.values() if backend.preference is not None]
    assert asked == sorted(set(asked))
    with pytest.raises(ValidationError, match="must be auto or one of"):
        model_config(attention="fast")
