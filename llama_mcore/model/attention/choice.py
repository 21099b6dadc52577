"""Which attention backend computes: each says what it supports, and the first that fits the case is taken.

Loads no backend and looks at no machine: what there is comes in as a `Case`.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

import torch

from llama_mcore.errors import ConfigError, Problem

MAXWELL, AMPERE, HOPPER = (5, 0), (8, 0), (9, 0)
_NARROW = (torch.bfloat16, torch.float16)
_DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64"}
_GENERATIONS = {(7, 0): "Volta", (7, 5): "Turing", (8, 9): "Ada", (9, 0): "Hopper"}
_SMALL_MEMORY = ((8, 6), (8, 9), (12, 0), (12, 1))
_ANY_WIDTH = 1 << 16


@dataclass(frozen=True)
class Case:
    """What attention has to do, and on what."""

    capability: tuple[int, int] | None
    """Compute capability of the GPU; None on the CPU."""
    dtype: torch.dtype
    head_dim: int
    documents: bool = False
    """It is called for each document, whose lengths differ."""
    deterministic: bool = False
    """The same bits each time."""
    by_hand: bool = True
    """The hand-written layer calls its forward and its backward."""

    def __str__(self) -> str:
        return f"{_generation(self.capability)} in {_DTYPES[self.dtype]}"


@dataclass(frozen=True)
class Limits:
    """What a backend supports. Grouped queries all do: keys are repeated for those that need it."""

    package: str | None = None
    """What it needs besides torch, by its name for pip."""
    on_cpu: bool = False
    """There it takes every dtype and head width, and gives the same bits each time."""
    oldest: Mapping[torch.dtype, tuple[int, int]] = field(
        default_factory=lambda: dict.fromkeys(_NARROW, AMPERE)
    )
    """The compute capability that a dtype needs; this and the rest on a GPU."""
    head_dim_multiple: int = 8
    largest_head_dim: int = 256
    largest_in_small_memory: int = _ANY_WIDTH
    """As largest_head_dim, on GPUs whose blocks share 99 KiB: 8.6, 8.9 and 12.x."""
    documents: bool = True
    deterministic: bool = False
    by_hand: bool = True

    def refusal(self, case: Case) -> str | None:
        """Why it cannot do that; None if it can."""
        return next(self._refusals(case), None)

    def _refusals(self, case: Case) -> Iterator[str]:
        if case.by_hand and not self.by_hand:
            yield "gives no log-sum-exp for the hand-written backward; set model.recompute=none"
        if case.capability is None:
            if not self.on_cpu:
                yield "needs a GPU"
            return
        oldest = self.oldest.get(case.dtype)
        if oldest is None:
            yield f"has no kernel for {_DTYPES[case.dtype]}"
        elif case.capability < oldest:
            needed, there = (f"{major}.{minor}" for major, minor in (oldest, case.capability))
            yield f"needs a GPU of compute capability {needed}, this one has {there}"
        if case.head_dim % self.head_dim_multiple:
            yield f"needs a head width that is a multiple of {self.head_dim_multiple}, not {case.head_dim}"
        is_small = case.capability in _SMALL_MEMORY
        largest = min(self.largest_head_dim, self.largest_in_small_memory if is_small else _ANY_WIDTH)
        if case.head_dim > largest:
            yield f"takes heads of at most {largest} channels here, not {case.head_dim}"
        if case.documents and not self.documents:
            yield "builds a plan for each new length, and documents have many"
        if case.deterministic and not self.deterministic:
            yield "does not give the same bits each time"


BACKENDS: dict[str, Limits] = {
    # aten/src/ATen/native/transformers/cuda/sdp_utils.cpp, as what follows. Wider heads than 128 it takes of
    # some widths and versions alone.
    "cudnn": Limits(oldest=dict.fromkeys(_NARROW, HOPPER), largest_head_dim=128, documents=False),
    # torch's own FlashAttention 2 and memory-efficient kernel. In the backward both add in any order unless
    # torch.use_deterministic_algorithms is on (attention_backward.cu).
    "flash": Limits(on_cpu=True, largest_in_small_memory=192, deterministic=True),
    "efficient": Limits(
        oldest={torch.bfloat16: AMPERE, torch.float16: MAXWELL, torch.float32: MAXWELL},
        largest_head_dim=_ANY_WIDTH,
        deterministic=True,
    ),
    "flash_attn": Limits(package="flash-attn", largest_in_small_memory=192, deterministic=True),
    "xformers": Limits(package="xformers", oldest=dict.fromkeys((*_NARROW, torch.float32), AMPERE)),
    "te": Limits(package="transformer-engine", by_hand=False),
    # softmax(q k^T) v, written out
    "reference": Limits(
        on_cpu=True,
        oldest=dict.fromkeys(_DTYPES, (0, 0)),
        head_dim_multiple=1,
        largest_head_dim=_ANY_WIDTH,
        deterministic=True,
    ),
}
"""In the order in which `auto` asks; those that need a package are taken by their name alone."""


@dataclass(frozen=True)
class Choice:
    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})"


def choose_attention(name: str, case: Case, present: Collection[str] = ()) -> Choice:
    """The backend of that name, or for `auto` the first that can do the case; `present`: packages that are
    installed.

    Raises ConfigError for a named one that cannot, with the reason and those that can.
    """
    reasons = {
        one: _missing(limits, present) or limits.refusal(case)
        for one, limits in BACKENDS.items()
        if one == name or name != "auto" or limits.package is None
    }
    able = [one for one, reason in reasons.items() if reason is None]
    if name == "auto":
        passed_over = [f"{one} {reason}" for one, reason in reasons.items() if reason is not None]
        before = passed_over[: list(reasons).index(able[0])]
        return Choice(able[0], "; ".join([str(case), *before]))
    if reason := reasons[name]:
        remedy = f"set model.attention to auto, or to one of {', '.join(able)}"
        raise ConfigError(Problem("model.attention", name, reason, remedy))
    return Choice(name, "as asked for")


def _missing(limits: Limits, present: Collection[str]) -> str | None:
    absent = limits.package is not None and limits.package not in present
    return f"needs the package {limits.package}, which is not installed" if absent else None


def _generation(capability: tuple[int, int] | None) -> str:
    """What NVIDIA calls GPUs of a compute capability."""
    if capability is None:
        return "CPU"
    major, minor = capability
    by_major = {8: "Ampere", 10: "Blackwell", 12: "Blackwell"}
    return _GENERATIONS.get(capability) or by_major.get(major) or f"compute capability {major}.{minor}"
