"""Differences between two checkpoints of any layouts: settings and state by name, tensors bit by bit.

For two checkpoints of runs, masters and moments. Weights in any formats: convert/diagnose.py.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from llama_mcore.checkpoint.reader import CheckpointReader
from llama_mcore.model.sharding import parameter_shapes

CHUNK = 1 << 22
"""Elements of a tensor that are compared at once."""


@dataclass(frozen=True)
class TensorDifference:
    parameter: str
    kind: str
    elements: int
    """Number whose bits differ, of `numel`: 0.0 and -0.0 differ, a NaN equals itself."""
    numel: int
    largest: float | None
    """Largest absolute difference over the largest absolute value of both; None where one is not finite."""


@dataclass(frozen=True)
class Comparison:
    left: str
    right: str
    fields: list[str]
    """Settings and state that differ, from `changed_settings`."""
    only_in_one: list[str]
    """Parameters that one of the two lacks or has in another shape."""
    tensors: list[TensorDifference]
    compared: int
    """Number of tensors, masters and moments."""

    @property
    def same(self) -> bool:
        return not (self.fields or self.only_in_one or self.tensors)


def compare(
    left: CheckpointReader,
    right: CheckpointReader,
    advance: Callable[[int], None] = lambda size: None,
) -> Comparison:
    """Compare two checkpoints, a few megabytes at a time; `advance` is called with the bytes read of one."""
    before, now = (
        reader.manifest.model_dump(mode="json", exclude={"files", "attempt"}) for reader in (left, right)
    )
    shapes, others = parameter_shapes(left.model), parameter_shapes(right.model)
    shared = [name for name in shapes if shapes[name] == others.get(name)]
    found = [
        _difference(left, right, name, kind, shapes[name].numel(), advance)
        for name, kind in product(shared, [kind for kind in left.kinds if kind in right.kinds])
    ]
    return Comparison(
        left=str(left.path),
        right=str(right.path),
        fields=changed_settings(before, now),
        only_in_one=[
            f"{name}: {_listed(shapes.get(name))} -> {_listed(others.get(name))}"
            for name in dict.fromkeys([*shapes, *others])
            if name not in shared
        ],
        tensors=[difference for difference in found if difference.elements],
        compared=len(found),
    )


def changed_settings(before: dict[str, Any], now: dict[str, Any], *, of_both: bool = False) -> list[str]:
    """Differences between two nested mappings, as `section.key: old -> new`; with `of_both`, only of keys
    that both have."""
    old, new = dict(_flat(before)), dict(_flat(now))
    return [
        f"{key}: {old.get(key, 'not set')} -> {new.get(key, 'not set')}"
        for key in dict.fromkeys([*old, *new])
        if old.get(key) != new.get(key) and not (of_both and (key not in old or key not in new))
    ]


def _flat(section: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in section.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _difference(
    left: CheckpointReader,
    right: CheckpointReader,
    name: str,
    kind: str,
    numel: int,
    advance: Callable[[int], None],
) -> TensorDifference:
    elements, apart, largest = 0, torch.zeros(()), torch.zeros(())
    for start in range(0, numel, CHUNK):
        count = min(CHUNK, numel - start)
        one, other = (reader.local(name, kind, 0, 1, start, count) for reader in (left, right))
        elements += int((one.view(torch.int32) != other.view(torch.int32)).sum())
        # maximum, unlike max of Python, keeps a NaN
        apart = torch.maximum(apart, _largest(one - other))
        largest = torch.maximum(largest, torch.maximum(_largest(one), _largest(other)))
        advance(one.nbytes)
    relative = (apart / largest).item() if apart != 0 else 0.0
    return TensorDifference(name, kind, elements, numel, relative if isfinite(relative) else None)


def _largest(values: Tensor) -> Tensor:
    return values.abs().max()


def _listed(shape: torch.Size | None) -> str:
    return "missing" if shape is None else str(list(shape))
