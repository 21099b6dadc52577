"""llama_mcore.diagnose.smoke: what works here passes; what is wrong, crashes or hangs is named."""

import os
import signal
import time
from dataclasses import replace

import pytest
import torch

from llama_mcore.diagnose import smoke
from llama_mcore.diagnose.smoke import Outcome, smoke_tests
from llama_mcore.errors import PreflightError, Problem
from tests.diagnose.test_doctor import environment_with, module
from tests.support.product import launched_environment
from tests.support.world import TIMEOUT_S, run_ranks

LIMIT_S = 0.5


def fail(which: str) -> str:
    """The kinds of ends that a kernel of somebody else's has."""
    if which == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if which == "hang":
        time.sleep(600)
    if which == "leave":
        os._exit(3)
    if which == "no memory":
        raise PreflightError(Problem("GPU", "0", "has no memory left", "end the other"))
    raise RuntimeError("no operator found\n  built for\n  another torch")


def outcomes(names: list[str], limit_s: float) -> list[Outcome]:
    smoke.TESTS["fail"] = fail
    return [smoke._outcome(f"fail {name}", limit_s) for name in names]


@pytest.mark.process
def test_ends_that_say_nothing_are_named() -> None:
    (crash, leave) = run_ranks(1, outcomes, ["crash", "leave"], TIMEOUT_S)[0]
    assert (crash.passed, crash.text) == (False, "ended its process (SIGSEGV)")
    assert (leave.passed, leave.text) == (False, "ended its process (exit code 3)")
    (hang,) = run_ranks(1, outcomes, ["hang"], LIMIT_S)[0]
    assert (hang.passed, hang.text) == (False, "hung for 0.5 s and was killed")


@pytest.mark.process
def test_errors_are_said_on_one_line() -> None:
    broken, full = run_ranks(1, outcomes, ["raise", "no memory"], TIMEOUT_S)[0]
    said = "RuntimeError: no operator found built for another torch"
    assert broken == Outcome(False, said)
    assert full == Outcome(False, "has no memory left", "end the other")


@pytest.mark.process
def test_what_runs_on_every_machine_passes() -> None:
    names = ["attention reference", "attention flash", "kernels plain"]
    found = smoke_tests(names, launched_environment())
    assert {name: outcome.passed for name, outcome in found.items()} == dict.fromkeys(names, True), found
    assert found["attention flash"].text == "forward and backward agree with the reference in bf16 and fp32"


@pytest.mark.process
def test_a_start_that_fails_fails_them_all(tmp_path) -> None:
    module(tmp_path, "torch", "raise ImportError('libcudart.so.99: cannot open')")
    found = smoke_tests(["attention flash", "kernels plain"], environment_with(tmp_path))
    assert [outcome.passed for outcome in found.values()] == [False, False]
    assert "libcudart.so.99" in found["kernels plain"].text


@pytest.mark.parametrize("dtype", smoke.DTYPES)
def test_rounding_passes_and_no_more(dtype: torch.dtype) -> None:
    expected = torch.randn(64, generator=torch.Generator().manual_seed(0))
    smoke._compare("it", [expected.to(dtype)], [expected], dtype)
    for wrong in (expected * 1.05, expected.roll(1), expected * float("nan")):
        with pytest.raises(ArithmeticError, match="relative error"):
            smoke._compare("it", [wrong.to(dtype)], [expected], dtype)


def test_a_backward_that_is_wrong_is_found(monkeypatch) -> None:
    """A backward that forgets the scale."""
    reference = smoke.load_backend("reference")

    def wrong(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        q, *rest = reference.backward(*tensors)
        return 8 * q, *rest

    backends = {"reference": reference, "flash": replace(reference, backward=wrong)}
    monkeypatch.setattr(smoke, "load_backend", backends.__getitem__)
    with pytest.raises(ArithmeticError, match="in bf16"):
        smoke._attention("flash")


def test_kernels_that_are_wrong_are_found(monkeypatch) -> None:
    wrong = replace(smoke.PLAIN, swiglu_backward=lambda grad, gate_up: gate_up)
    monkeypatch.setattr(smoke, "load_kernels", lambda name: wrong)
    with pytest.raises(ArithmeticError):
        smoke._kernels("compile")
