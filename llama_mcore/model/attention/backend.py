"""The interface of an attention backend: its limits, its functions, and its place in the choice.

Each backend is one file, NAME_backend.py, whose BACKEND describes it completely: model.attention, the choice,
the doctor and the documentation read it from there. A backend imports the package that it needs inside its
functions, since its description is also read where that package is not installed.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NoReturn

import torch
from torch import Tensor

MAXWELL, AMPERE, HOPPER, BLACKWELL = (5, 0), (8, 0), (9, 0), (10, 0)
NARROW = (torch.bfloat16, torch.float16)
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64"}
ANY_WIDTH = 1 << 16
_GENERATIONS = {(7, 0): "Volta", (7, 5): "Turing", (8, 9): "Ada", (9, 0): "Hopper"}
_SMALL_MEMORY = ((8, 6), (8, 9), (12, 0), (12, 1))


@dataclass(frozen=True)
class Case:
    """Task of an attention backend, and the device that it runs on."""

    capability: tuple[int, int] | None
    """Compute capability of the GPU; None on the CPU."""
    dtype: torch.dtype
    head_dim: int
    documents: bool = False
    """Called once per document, each of another length."""
    deterministic: bool = False
    """Must give the same bits each time."""
    manual_backward: bool = True
    """Called through its own forward and backward, by the layer with a manual backward."""

    def __str__(self) -> str:
        return f"{_generation(self.capability)} in {DTYPES[self.dtype]}"


@dataclass(frozen=True)
class Limits:
    """Cases that a backend supports. All support grouped queries, some by repeating the keys."""

    package: str | None = None
    """Package that it needs besides torch, by its name for pip."""
    install: str = ""
    """Command or hint to install that package."""
    on_cpu: bool = False
    """Runs on the CPU, with every dtype and head width, and gives the same bits each time."""
    oldest: Mapping[torch.dtype, tuple[int, int]] = field(
        default_factory=lambda: dict.fromkeys(NARROW, AMPERE)
    )
    """Oldest compute capability for each dtype. Applies to GPUs only, like all limits below."""
    head_dim_multiple: int = 8
    largest_head_dim: int = 256
    largest_in_small_memory: int = ANY_WIDTH
    """largest_head_dim on GPUs with 99 KiB of shared memory per block: 8.6, 8.9 and 12.x."""
    documents: bool = True
    deterministic: bool = False
    manual_backward: bool = True

    def refusal(self, case: Case) -> str | None:
        """Reason why this backend cannot do `case`; None if it can."""
        return next(self._refusals(case), None)

    def _refusals(self, case: Case) -> Iterator[str]:
        if case.manual_backward and not self.manual_backward:
            yield "gives no log-sum-exp for the manual backward (model.recompute=none does without)"
        if case.capability is None:
            if not self.on_cpu:
                yield "needs a GPU"
            return
        oldest = self.oldest.get(case.dtype)
        if oldest is None:
            yield f"has no kernel for {DTYPES[case.dtype]}"
        elif case.capability < oldest:
            needed, found = (f"{major}.{minor}" for major, minor in (oldest, case.capability))
            yield f"needs a GPU of compute capability {needed} or newer, but this one has {found}"
        if case.head_dim % self.head_dim_multiple:
            yield f"needs a head_dim that is a multiple of {self.head_dim_multiple}, not {case.head_dim}"
        is_small = case.capability in _SMALL_MEMORY
        largest = min(self.largest_head_dim, self.largest_in_small_memory if is_small else ANY_WIDTH)
        if case.head_dim > largest:
            yield f"supports heads of at most {largest} channels on this GPU, not {case.head_dim}"
        if case.documents and not self.documents:
            yield "builds a plan for each new length, and documents have many lengths"
        if case.deterministic and not self.deterministic:
            yield "does not give the same bits each time"


def _not_offered(*_: Tensor) -> NoReturn:
    raise RuntimeError("this attention backend has no forward and backward of its own")


@dataclass(frozen=True)
class AttentionBackend:
    """Causal softmax(q k^T / sqrt(D)) v for q [S, B, N, D] and k, v [S, B, G, D], G a divisor of N."""

    about: str
    """Description for users, in a few words."""
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
    """Order under model.attention=auto, lower numbers first; None: used only when named."""

    @property
    def supports_manual_backward(self) -> bool:
        """True if it has a forward and backward of its own."""
        return self.forward is not _not_offered


def _generation(capability: tuple[int, int] | None) -> str:
    """NVIDIA's name for the GPUs of a compute capability."""
    if capability is None:
        return "CPU"
    major, minor = capability
    by_major = {8: "Ampere", 10: "Blackwell", 12: "Blackwell"}
    return _GENERATIONS.get(capability) or by_major.get(major) or f"compute capability {major}.{minor}"
