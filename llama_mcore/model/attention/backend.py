"""An attention backend: what it is, what it supports, itself under autograd, and its forward and backward.

Each is one file, NAME_backend.py, whose BACKEND says all that there is to know of it: model.attention, the
choice, the doctor and the documentation read it from there. It imports a package that it needs inside its
functions, since it is looked at where that is not installed.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NoReturn

import torch
from torch import Tensor

MAXWELL, AMPERE, HOPPER = (5, 0), (8, 0), (9, 0)
NARROW = (torch.bfloat16, torch.float16)
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64"}
ANY_WIDTH = 1 << 16
_GENERATIONS = {(7, 0): "Volta", (7, 5): "Turing", (8, 9): "Ada", (9, 0): "Hopper"}
_SMALL_MEMORY = ((8, 6), (8, 9), (12, 0), (12, 1))


@dataclass(frozen=True)
class Case:
    """Task of attention, and the device that does it."""

    capability: tuple[int, int] | None
    """Compute capability of the GPU; None on the CPU."""
    dtype: torch.dtype
    head_dim: int
    documents: bool = False
    """It is called for each document, whose lengths differ."""
    deterministic: bool = False
    """The same bits each time."""
    manual_backward: bool = True
    """The hand-written layer calls its forward and its backward."""

    def __str__(self) -> str:
        return f"{_generation(self.capability)} in {DTYPES[self.dtype]}"


@dataclass(frozen=True)
class Limits:
    """Cases that a backend supports. Grouped queries all do: keys are repeated for those that need it."""

    package: str | None = None
    """Package that it needs besides torch, by its name for pip."""
    install: str = ""
    """How to install that package, for people."""
    on_cpu: bool = False
    """There it takes every dtype and head width, and gives the same bits each time."""
    oldest: Mapping[torch.dtype, tuple[int, int]] = field(
        default_factory=lambda: dict.fromkeys(NARROW, AMPERE)
    )
    """The compute capability that a dtype needs; this and the rest on a GPU."""
    head_dim_multiple: int = 8
    largest_head_dim: int = 256
    largest_in_small_memory: int = ANY_WIDTH
    """As largest_head_dim, on GPUs whose blocks share 99 KiB: 8.6, 8.9 and 12.x."""
    documents: bool = True
    deterministic: bool = False
    manual_backward: bool = True

    def refusal(self, case: Case) -> str | None:
        """Why it cannot do that; None if it can."""
        return next(self._refusals(case), None)

    def _refusals(self, case: Case) -> Iterator[str]:
        if case.manual_backward and not self.manual_backward:
            yield "gives no log-sum-exp for the hand-written backward; set model.recompute=none"
        if case.capability is None:
            if not self.on_cpu:
                yield "needs a GPU"
            return
        oldest = self.oldest.get(case.dtype)
        if oldest is None:
            yield f"has no kernel for {DTYPES[case.dtype]}"
        elif case.capability < oldest:
            needed, there = (f"{major}.{minor}" for major, minor in (oldest, case.capability))
            yield f"needs a GPU of compute capability {needed}, this one has {there}"
        if case.head_dim % self.head_dim_multiple:
            yield f"needs a head width that is a multiple of {self.head_dim_multiple}, not {case.head_dim}"
        is_small = case.capability in _SMALL_MEMORY
        largest = min(self.largest_head_dim, self.largest_in_small_memory if is_small else ANY_WIDTH)
        if case.head_dim > largest:
            yield f"takes heads of at most {largest} channels here, not {case.head_dim}"
        if case.documents and not self.documents:
            yield "builds a plan for each new length, and documents have many"
        if case.deterministic and not self.deterministic:
            yield "does not give the same bits each time"


def _not_offered(*_: Tensor) -> NoReturn:
    raise RuntimeError("this attention backend has no forward and backward of its own")


@dataclass(frozen=True)
class AttentionBackend:
    """Causal softmax(q k^T / sqrt(D)) v for q [S, B, N, D] and k, v [S, B, G, D], G a divisor of N."""

    about: str
    """For people, in a few words."""
    limits: Limits
    attend: Callable[[Tensor, Tensor, Tensor], Tensor]
    """(q, k, v) -> out [S, B, N, D], differentiable."""
    forward: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]] = _not_offered
    """(q, k, v) -> out [S, B, N, D] and the log-sum-exp of each row of scores [B, N, S], fp32 or wider."""
    backward: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]] = (
        _not_offered
    )
    """(grad_out, q, k, v, out, log_sum_exp) -> gradients of q, k and v."""
    preference: int | None = None
    """model.attention=auto asks those with a lower number first; None: taken by its name alone."""

    @property
    def supports_manual_backward(self) -> bool:
        """Whether the hand-written layer can use it."""
        return self.forward is not _not_offered


def _generation(capability: tuple[int, int] | None) -> str:
    """What NVIDIA calls GPUs of a compute capability."""
    if capability is None:
        return "CPU"
    major, minor = capability
    by_major = {8: "Ampere", 10: "Blackwell", 12: "Blackwell"}
    return _GENERATIONS.get(capability) or by_major.get(major) or f"compute capability {major}.{minor}"
