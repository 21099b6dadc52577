"""`llama-mcore compare-checkpoints`: where two checkpoints of any formats differ, and the likely cause.

Tensors are compared as `Weights` (model_weights.py), in the order of the model, so that the first one that
differs is where the two models begin to compute different things. For each that differs the known mistakes of
conversion are tried on one side: the one that makes both equal is the cause.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from math import isnan, nan
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama_mcore.checkpoint.manifest import changed_fields
from llama_mcore.checkpoint.paths import WEIGHT
from llama_mcore.convert.fused_weights import interleaved, is_vocabulary, join_qkv, split, split_qkv
from llama_mcore.convert.model_weights import Weights
from llama_mcore.convert.open import open_weights
from llama_mcore.convert.registry import check_there
from llama_mcore.data.data_plan import format_table
from llama_mcore.errors import shown
from llama_mcore.model.config import ModelConfig
from llama_mcore.model.parameters import FUSED, parameter_of, pattern_of
from llama_mcore.progress import ByteProgress

_SHOWN = 20
# Field that conversions lose -> the effect of a wrong value.
_FIELDS = {
    "rope_theta": "the rotary frequencies differ: one side fell back to a default theta",
    "norm_eps": "RMSNorm's epsilon differs: it fell back to a default",
    "rope_scaling": "only one side scales its rotary frequencies as Llama 3.1 does",
    "vocab_size": "the vocabulary differs: one side counts rows of padding for tensor parallelism",
    "tie_embeddings": "one side has an output layer of its own",
}


@dataclass(frozen=True)
class Difference:
    tensor: str
    part: str
    """q, k, v, gate or up, where the tensor is fused from these."""
    largest: float
    """Largest absolute difference over the largest absolute value; NaN where one is not finite."""
    cause: str
    """Empty if no known mistake explains all of it."""


@dataclass
class Diagnosis:
    left: str
    right: str
    fields: dict[str, str] = field(default_factory=dict)
    """Settings that differ -> both values and the effect."""
    tensors: list[Difference] = field(default_factory=list)
    compared: int = 0
    rounded_to: str = ""
    """The narrower dtype of the two, in which they are compared."""

    @property
    def same(self) -> bool:
        return not (self.fields or self.tensors)

    @property
    def cause(self) -> str:
        """The likeliest cause: that of most tensors, else that of a setting."""
        causes = Counter(each.cause for each in self.tensors if each.cause)
        if causes:
            return causes.most_common(1)[0][0]
        return next(iter(self.fields.values()), "" if self.same else "unknown")


def compare_checkpoints(
    left: Path, right: Path, *, model: str | None = None, source: str | None = None, as_json: bool = False
) -> bool:
    """Print how two checkpoints differ; True if they are the same. `source`: the format of the first."""
    check_there(left, "LEFT")
    check_there(right, "RIGHT")
    one, other = open_weights(left, source, model), open_weights(right, None, model)
    with ByteProgress("compare", 4 * one.model.num_params()) as progress:
        found = diagnose(one, other, progress.advance)
    found.left, found.right = str(left), str(right)
    print(json.dumps(_as_json(found), indent=2) if as_json else "\n".join(_as_text(found)), flush=True)
    return found.same


def diagnose(left: Weights, right: Weights, advance: Callable[[int], None] = lambda size: None) -> Diagnosis:
    """Compare two `Weights` in the narrower of their dtypes, with one tensor of each in memory at a time."""
    found = Diagnosis("", "")
    for name in changed_fields(left.model, right.model):
        values = f"{getattr(left.model, name)} and {getattr(right.model, name)}"
        found.fields[name] = f"{values}: {_FIELDS.get(name, 'another model')}"
    narrow = min((left.dtype, right.dtype), key=lambda dtype: (dtype.itemsize, dtype == torch.bfloat16))
    found.rounded_to = str(narrow).removeprefix("torch.") if left.dtype != right.dtype else ""
    shared = set(right.names())
    for name in left.names():
        if name in shared:
            one, other = left.full(name).to(narrow), right.full(name).to(narrow)
            found.tensors += _differences(name, one, other, left.model)
            found.compared += 1
            advance(4 * one.numel())
    return found


def _differences(name: str, left: Tensor, right: Tensor, model: ModelConfig) -> Iterator[Difference]:
    fused = parameter_of(name).fused
    if is_vocabulary(name):
        rows = min(len(left), len(right))
        left, right = left[:rows], right[:rows]  # the number of rows is compared with the configuration
    if left.shape != right.shape:
        yield Difference(name, "", nan, f"shapes {list(left.shape)} and {list(right.shape)}")
    elif _equal(left, right):
        return
    elif cause := _cause(fused or "", left, right, model):
        yield Difference(name, "", _largest(left, right), cause)
    else:
        parts = zip(FUSED[fused], split(name, left, model), split(name, right, model), strict=True)
        for label, one, other in parts:
            if not _equal(one, other):
                yield Difference(name, label, _largest(one, other), _cause(label, one, other, model))


def _cause(what: str, left: Tensor, right: Tensor, model: ModelConfig) -> str:
    """The mistake that turns one tensor into the other. `what`: qkv or gate_up, or the name of a part."""
    for cause, mistake in _MISTAKES.items():
        results = ((mistake(what, one, model), other) for one, other in ((left, right), (right, left)))
        if any(result is not None and _equal(result, other) for result, other in results):
            return cause
    return ""


def _exchanged(what: str, weight: Tensor, model: ModelConfig) -> Tensor | None:
    return torch.cat(weight.chunk(2)[::-1]) if what == "gate_up" else None


def _ungrouped(what: str, weight: Tensor, model: ModelConfig) -> Tensor | None:
    return torch.cat(split_qkv(weight, model)) if what == "qkv" else None


def _unpermuted(what: str, weight: Tensor, model: ModelConfig) -> Tensor | None:
    """q or k alone, or the fused weight with both, in the rows of interleaved rope."""
    if what in ("q", "k"):
        return interleaved(weight, weight.size(0) // model.head_dim)
    if what != "qkv":
        return None
    q, k, v = split_qkv(weight, model)
    q, k = (interleaved(part, part.size(0) // model.head_dim) for part in (q, k))
    return join_qkv(q, k, v, model)


def _transposed(what: str, weight: Tensor, model: ModelConfig) -> Tensor | None:
    return weight.t().reshape(weight.shape) if weight.dim() == 2 else None


_MISTAKES: dict[str, Callable[[str, Tensor, ModelConfig], Tensor | None]] = {
    "the permutation is missing: q and k have the rows of interleaved rope on one side": _unpermuted,
    "gate and up are exchanged on one side": _exchanged,
    "q, k and v are stored one after the other on one side, by key/value group on the other": _ungrouped,
    "transposed on one side": _transposed,
    "one side went through bf16": lambda what, weight, model: weight.bfloat16().to(weight.dtype),
    "one side is all zeros: it was never filled": lambda what, weight, model: torch.zeros_like(weight),
}


def _equal(left: Tensor, right: Tensor) -> bool:
    return left.shape == right.shape and torch.equal(left, right)


def _largest(left: Tensor, right: Tensor) -> float:
    left, right = left.float(), right.float()
    scale = max(left.abs().max().item(), right.abs().max().item())
    return (left - right).abs().max().item() / scale if scale else 0.0


def _rows(found: list[Difference]) -> list[tuple[str, ...]]:
    """A row for all tensors with the same cause; where none is known, for each parameter of all layers."""
    groups: dict[tuple[str, ...], list[Difference]] = {}
    for each in found:
        parameter = (pattern_of(each.tensor)[0], each.part)
        groups.setdefault((each.cause,) if each.cause else ("", *parameter), []).append(each)
    return [
        (
            f"{len(group):,}",
            _only({pattern_of(each.tensor)[0] for each in group}),
            _only({each.part for each in group}),
            f"{max((each.largest for each in group), key=lambda value: (isnan(value), value)):.2e}",
            group[0].cause or "?",
        )
        for group in groups.values()
    ]


def _only(values: set[str]) -> str:
    return values.pop() if len(values) == 1 else "several"


def _as_json(found: Diagnosis) -> dict[str, Any]:
    return {**asdict(found), "same": found.same, "cause": found.cause, "kind": WEIGHT}


def _as_text(found: Diagnosis) -> Iterator[str]:
    rounded = f", compared in {found.rounded_to}" if found.rounded_to else ""
    if found.same:
        yield f"the same: {found.compared:,} tensors{rounded}, and the configuration"
        return
    first = found.tensors[0].tensor if found.tensors else "none: all tensors are equal"
    yield f"first difference: {first}"
    yield f"likely cause:     {found.cause}"
    for name, values in found.fields.items():
        yield f"  {name} = {shown(values, 500)}"
    if found.tensors:
        rows = _rows(found.tensors)
        yield format_table([("number", "tensor", "part", "largest difference", "cause"), *rows[:_SHOWN]])
        if len(rows) > _SHOWN:
            yield f"and {len(rows) - _SHOWN:,} more"
    names = {each.tensor for each in found.tensors}
    yield f"{len(names):,} of {found.compared:,} tensors differ{rounded}, {len(found.fields):,} settings do"
