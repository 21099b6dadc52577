"""Smoke tests of GPUs, attention backends and kernels: each does a little work in a process of its own.

A third-party kernel may crash, hang, or leave its GPU unusable for what comes after.

    python -m llama_mcore.diagnose.smoke FOLDER NAME...

writes to FOLDER/outcomes a line of JSON for each name: [name, the fields of its Outcome]; not to stdout,
where such kernels may print.
"""

import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch import Tensor

from llama_mcore.diagnose.allreduce import START_S, failure_of_command
from llama_mcore.distributed.device import compute_capability, on_gpu, select_device
from llama_mcore.errors import LlamaMcoreError, shown
from llama_mcore.model.attention import BACKENDS, AttentionBackend, Case, load_backend
from llama_mcore.model.kernels import PLAIN, Kernels, load_kernels
from llama_mcore.model.rope import rope_table

MODULE = "llama_mcore.diagnose.smoke"
LIMITS_S = {"gpu": 120.0, "attention": 120.0, "kernels": 300.0}
"""Seconds, by the first word of a name. Compiling takes half a minute of a core, and a busy machine has
few."""
DTYPES = (torch.bfloat16, torch.float32)
"""Dtypes of train.precision."""
S, B, N, G, D = 128, 1, 4, 2, 64
_LONGEST_TEXT = 400


@dataclass(frozen=True)
class Outcome:
    """Outcome of a smoke test."""

    passed: bool
    text: str
    """Comparison that it passed, or the reason of its failure, on one line."""
    remedy: str = ""


def smoke_tests(names: Sequence[str], environ: Mapping[str, str]) -> dict[str, Outcome]:
    """Outcomes of the tests of these names; one that exceeds its LIMITS_S is killed and has failed."""
    # else Inductor starts a pool of processes, which would outlive a test
    environ = {**environ, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", MODULE, folder, *names]
        failure = failure_of_command(command, environ, START_S + sum(map(_limit_s, names)))
        path = Path(folder, "outcomes")
        lines = path.read_text().splitlines() if path.exists() else []
    found = {name: Outcome(**fields) for name, fields in map(json.loads, lines)}
    return {name: found.get(name) or Outcome(False, failure or "gave no result") for name in names}


def attention_cases(name: str) -> list[Case]:
    """Cases that a run may give an attention backend here and that it supports: one for each dtype, with the
    manual backward where it has one."""
    refusal = BACKENDS[name].limits.refusal
    cases = []
    for dtype in DTYPES:
        possible = [attention_case(dtype, manual_backward) for manual_backward in (True, False)]
        cases += [case for case in possible if refusal(case) is None][:1]
    return cases


def attention_case(dtype: torch.dtype, manual_backward: bool = True) -> Case:
    """Case of the tensors of these tests, on this rank's device."""
    return Case(capability=compute_capability(), dtype=dtype, head_dim=D, manual_backward=manual_backward)


def main() -> None:
    """Fork the tests one after another, which is safe as long as this process has not touched a GPU."""
    folder, names = Path(sys.argv[1]), sys.argv[2:]
    with open(folder / "outcomes", "w", encoding="utf-8") as file:
        for name in names:
            print(json.dumps([name, asdict(_outcome(name, _limit_s(name)))]), file=file, flush=True)


def _limit_s(name: str) -> float:
    return LIMITS_S[name.partition(" ")[0]]


def _outcome(name: str, limit_s: float) -> Outcome:
    fork = get_context("fork")
    receiver, sender = fork.Pipe(duplex=False)
    process = fork.Process(target=_run, args=(name, sender))
    process.start()
    sender.close()
    try:
        if not receiver.poll(limit_s):
            return Outcome(False, f"hung for {limit_s:g} s and was killed")
        return receiver.recv()
    except EOFError:
        process.join()
        code = process.exitcode or 0
        ended = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return Outcome(False, f"ended its process ({ended})")
    finally:
        process.kill()
        process.join()


def _run(name: str, sender: Connection) -> None:
    kind, _, which = name.partition(" ")
    try:
        outcome = Outcome(True, TESTS[kind](which))
    except LlamaMcoreError as error:
        problem = error.problems[0]
        outcome = Outcome(False, problem.reason, problem.remedy)
    except BaseException as error:  # a third-party package may raise anything
        text = " ".join(f"{type(error).__name__}: {error}".split())
        outcome = Outcome(False, shown(text, _LONGEST_TEXT))
    sender.send(outcome)


def _gpu(index: str) -> str:
    """Multiply two matrices on a GPU."""
    os.environ["LOCAL_RANK"] = index
    ones = torch.ones(D, D, device=select_device())
    _compare("a matrix product", [ones @ ones], [ones * D], torch.float32)
    return "computes"


def _attention(name: str) -> str:
    device, backend = select_device(), load_backend(name)
    reference = load_backend("reference")
    cases = attention_cases(name)
    for case in cases:
        inputs = [_normal(S, B, heads, D, seed=seed) for seed, heads in enumerate((N, G, G, N))]
        narrow = [tensor.to(device, case.dtype) for tensor in inputs]
        expected = _manually(reference, *(tensor.float() for tensor in narrow))
        answer = _manually if case.manual_backward else _by_autograd
        _compare(f"in {short(case.dtype)}", answer(backend, *narrow), expected, case.dtype)
    dtypes = " and ".join(short(case.dtype) for case in cases)
    return f"forward and backward agree with the reference in {dtypes}"


def _manually(backend: AttentionBackend, q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> list[Tensor]:
    out, log_sum_exp = backend.forward(q, k, v)
    return [out, *backend.backward(grad, q, k, v, out, log_sum_exp)]


def _by_autograd(backend: AttentionBackend, q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> list[Tensor]:
    qkv = [tensor.requires_grad_() for tensor in (q, k, v)]
    out = backend.attend(*qkv)
    return [out.detach(), *torch.autograd.grad(out, qkv, grad)]


def _kernels(name: str) -> str:
    """Compare norms, rotations and SwiGLU in the dtype of training here with the plain functions in fp32."""
    device, dtype = select_device(), torch.bfloat16 if on_gpu() else torch.float32
    shapes = ((S, B, D), (S, B, D), (S, B, N, D), (S, B, G, D), (S, B, (N + 2 * G) * D), (S, B, 2 * D))
    narrow = [_normal(*shape, seed=seed).to(device, dtype) for seed, shape in enumerate(shapes)]
    expected = _answers(PLAIN, *(tensor.float() for tensor in narrow))
    _compare(f"in {short(dtype)}", _answers(load_kernels(name), *narrow), expected, dtype)
    return f"forward and backward agree with plain in {short(dtype)}"


def _answers(
    kernels: Kernels, x: Tensor, grad: Tensor, q: Tensor, k: Tensor, qkv: Tensor, gate_up: Tensor
) -> list[Tensor]:
    weight = torch.ones_like(x[0, 0])
    heads = *rope_table(S, D, 10000.0, x.device), N // G
    return [
        kernels.rmsnorm(x, weight, 1e-6),
        *kernels.rmsnorm_backward(grad, x, weight, 1e-6, x),
        *kernels.rotated_qkv(qkv, *heads),
        kernels.rotated_qkv_backward(q, k, k, qkv, *heads)[0],
        kernels.swiglu(gate_up),
        kernels.swiglu_backward(grad, gate_up),
    ]


def _compare(what: str, found: Sequence[Tensor], expected: Sequence[Tensor], dtype: torch.dtype) -> None:
    """Compare by norms. Raises ArithmeticError beyond rounding.

    A kernel rounds to the dtype at most eight times on the way from its input to a result (weights, products,
    the output and its gradient), and sums up to S numbers in fp32: each rounding adds at most its unit, eps /
    2, to the relative error. Wrong results are off by about 1.
    """
    bound = 4 * torch.finfo(dtype).eps + S / 2 * torch.finfo(torch.float32).eps
    for mine, theirs in zip(found, expected, strict=True):
        mine, theirs = mine.double(), theirs.double()
        error = float((mine - theirs).norm() / theirs.norm())
        if not error <= bound:  # NaN is an error too
            raise ArithmeticError(
                f"{what}: relative error {error:.2g}, but rounding explains {bound:.2g} at most"
            )


def _normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def short(dtype: torch.dtype) -> str:
    return "bf16" if dtype is torch.bfloat16 else "fp32"


TESTS: dict[str, Callable[[str], str]] = {"gpu": _gpu, "attention": _attention, "kernels": _kernels}

if __name__ == "__main__":
    main()
