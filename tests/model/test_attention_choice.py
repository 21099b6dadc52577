"""Backends are chosen by name; one that cannot run here says why and what can."""

import pytest
import torch

from llama_mcore.errors import ConfigError
from llama_mcore.model.attention import REQUIRES, attention_backend, installed
from tests.support.errors import refused


def test_auto_is_sdpa() -> None:
    assert attention_backend("auto", by_hand=True) is attention_backend("sdpa", by_hand=True)


def test_what_is_installed_has_its_halves_or_says_so() -> None:
    assert {"reference", "sdpa"} <= set(installed()) <= set(REQUIRES)
    for name in installed():
        assert attention_backend(name, by_hand=False).attend


@pytest.mark.parametrize("name", ["flash", "xformers", "te"])
def test_a_backend_that_is_not_here_is_refused(name: str) -> None:
    with refused(ConfigError, "model.attention", name) as caught:
        attention_backend(name, by_hand=False)
    (problem,) = caught.value.problems
    assert problem.remedy.endswith("reference, sdpa")


@pytest.mark.gpu
@pytest.mark.process  # Triton compiles in one
@pytest.mark.parametrize("groups", [8, 2])
@pytest.mark.parametrize("name", [name for name in REQUIRES if name != "reference"])
def test_gpu_backends_agree_with_the_reference(gpu: torch.device, name: str, groups: int) -> None:
    """bf16 against the reference in fp32; outputs are averages of values of size 1, each rounded by 2^-9."""
    if name not in installed():
        pytest.skip(f"needs the package {REQUIRES[name]}")
    backend = attention_backend(name, by_hand=False)
    reference = attention_backend("reference", by_hand=True)
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(256, 2, heads, 64, device=gpu, dtype=torch.bfloat16, requires_grad=True)
        for heads in (8, groups, groups)
    )
    grad = torch.randn(256, 2, 8, 64, device=gpu, dtype=torch.bfloat16)
    wide = [x.detach().float() for x in (q, k, v)]
    expected, log_sum_exp = reference.forward(*wide)
    expected_grads = reference.backward(grad.float(), *wide, expected, log_sum_exp)
    found = backend.attend(q, k, v)
    answers = [(found, torch.autograd.grad(found, (q, k, v), grad))]
    if backend.has_halves:
        out, lse = backend.forward(q.detach(), k.detach(), v.detach())
        answers.append((out, backend.backward(grad, q.detach(), k.detach(), v.detach(), out, lse)))
    for out, grads in answers:
        torch.testing.assert_close(out.float(), expected, rtol=2e-2, atol=2e-2)
        for ours, theirs in zip(grads, expected_grads, strict=True):
            torch.testing.assert_close(ours.float(), theirs, rtol=5e-2, atol=5e-2)
