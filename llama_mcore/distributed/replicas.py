"""Comparison of replicated weights over the ranks that should hold them equal, bit for bit.

Each rank updates its copy of a norm weight by itself, and nothing else compares the copies: a wrong bit, or a
rounding that differs, would go unnoticed (so the layer norms of BLOOM drifted apart over tensor-parallel
ranks). Ranks exchange hashes of the bits, computed on their devices.
"""

import socket
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llama_mcore.distributed.groups import Groups
from llama_mcore.errors import NumericalError, Problem

_CHUNK = 1 << 22
"""Elements hashed at a time: bounds the int64 copies to some tens of megabytes."""
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
"""2^64 over the golden ratio, as a signed number: its multiples look random."""
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_SHOWN = 5


@dataclass(frozen=True)
class _Copies:
    """Parameters of which every rank of a group has an equal copy."""

    group_name: str
    group: dist.ProcessGroup
    tensors: Mapping[str, Tensor]


def check_replicas(model: nn.Module, groups: Groups, step: int) -> None:
    """Raise NumericalError on all ranks if a copy differs on any, naming those in the minority.

    One element that differs is always found; several are missed once in 2^64.
    Collective: all ranks call it.
    """
    kinds = _copies(model, groups)
    hashes = [_hashes(copies.tensors.values(), groups.device) for copies in kinds]
    differs = torch.zeros((), dtype=torch.int64, device=groups.device)
    for copies, mine in zip(kinds, hashes, strict=True):
        extremes = torch.stack((mine, ~mine))  # the largest of ~x is that of the smallest x
        dist.all_reduce(extremes, dist.ReduceOp.MAX, group=copies.group)
        differs |= (extremes[0] != ~extremes[1]).any()
    dist.all_reduce(differs, dist.ReduceOp.MAX)
    if differs.item():
        problems = [
            problem
            for copies, mine in zip(kinds, hashes, strict=True)
            for problem in _differing(copies, mine, groups.rank)
        ]
        raise NumericalError(_of_all_ranks(problems, groups.world_size, step))


def bit_hash(values: Tensor) -> Tensor:
    """Sum of the elements' bits, each multiplied by an odd number of its own, modulo 2^64; int64 []."""
    flat = values.detach().reshape(-1).view(_BITS[values.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=values.device)
    for start in range(0, flat.numel(), _CHUNK):
        chunk = flat[start : start + _CHUNK]
        places = torch.arange(start, start + chunk.numel(), device=values.device)
        total += (chunk * (places.mul_(_GOLDEN) | 1)).sum()
    return total


def _copies(model: nn.Module, groups: Groups) -> tuple[_Copies, _Copies]:
    """Weights replicated over data-parallel ranks, and those replicated over tensor-parallel ranks.

    ZeRO-3 leaves an empty tensor of a weight that it has partitioned, and puts this rank's part into
    `ds_tensor`: that is not replicated over data parallelism, but is over tensor parallelism if the weight is
    not split there.
    """
    named: dict[str, Any] = dict(model.named_parameters())
    whole = {name: weight for name, weight in named.items() if weight.numel()}
    uncut = {
        name: weight if weight.numel() else weight.ds_tensor
        for name, weight in named.items()
        if not weight.tensor_model_parallel
    }
    return (
        _Copies("data-parallel", groups.dp_group, whole),
        _Copies("tensor-parallel", groups.tp_group, uncut),
    )


def _hashes(tensors: Iterable[Tensor], device: torch.device) -> Tensor:
    """Hashes of tensors, int64 [number of tensors]."""
    hashes = [bit_hash(tensor) for tensor in tensors]
    return torch.stack(hashes) if hashes else torch.zeros(0, dtype=torch.int64, device=device)


def _differing(copies: _Copies, mine: Tensor, rank: int) -> Iterator[Problem]:
    """Weights that differ here from the majority of the group; without a majority all ranks differ."""
    gathered = [torch.empty_like(mine) for _ in range(copies.group.size())]
    dist.all_gather(gathered, mine, group=copies.group)
    for number, name in enumerate(copies.tensors):
        values = [int(hashes[number]) for hashes in gathered]
        common, count = Counter(values).most_common(1)[0]
        if count == len(values):
            continue
        majority = 2 * count > len(values)
        if not majority or int(mine[number]) != common:
            most = f"the {count} others that agree" if majority else "others, without a majority,"
            where = f"rank {rank} on {socket.gethostname()}"
            yield Problem(name, where, f"differs from {most} in its {copies.group_name} group")


def _of_all_ranks(problems: Sequence[Problem], world_size: int, step: int) -> list[Problem]:
    """Problems of all ranks, the first few of each, with a remedy."""
    gathered: list[list[Problem]] = [[]] * world_size
    shown = list(problems[:_SHOWN])
    if len(problems) > _SHOWN:
        shown.append(Problem(f"{len(problems) - _SHOWN} more weights", shown[0].value, "differ"))
    dist.all_gather_object(gathered, shown)
    found = [problem for of_rank in gathered for problem in of_rank]
    remedy = (
        f"found after step {step:,}, which is not saved; check that machine, then start the same command "
        "again: it continues from the newest checkpoint"
    )
    return [*found[:-1], Problem(found[-1].field, found[-1].value, found[-1].reason, remedy)]
