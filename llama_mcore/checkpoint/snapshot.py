"""Copy of a run's state to host memory, while training goes on."""

import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from threading import Event

import torch
from deepspeed import DeepSpeedEngine
from torch import Tensor

from llama_mcore.checkpoint.config import CheckpointConfig
from llama_mcore.checkpoint.optimizer_shards import (
    Fragment,
    create_optimizer_state,
    has_optimizer_state,
    owned_fragments,
)
from llama_mcore.checkpoint.paths import KINDS, fragment_key
from llama_mcore.distributed.cgroup import available_memory
from llama_mcore.distributed.collectives import gather_on_all_ranks
from llama_mcore.distributed.device import CopyStream, host_block, on_gpu
from llama_mcore.distributed.groups import Groups
from llama_mcore.errors import NumericalError, Problem
from llama_mcore.model.sharding import split_of
from llama_mcore.units import format_bytes

SLOTS = 16
"""Slots of a ring: one is filled, one is written and hashed, and hashing may lag behind by all others."""
_FP32 = 4


class HostCopy:
    """Host memory for this rank's saves, allocated once and in one block.

    It holds a whole save; or, as a ring, the part that is being written, and training waits for all of it.
    """

    def __init__(self, sizes: Mapping[str, int], ring_bytes: int | None = None) -> None:
        """`sizes`: elements of each tensor that is saved, by its key and in its order in the file.

        Raises PreflightError where the memory cannot be allocated.
        """
        self.sizes = dict(sizes)
        self.is_ring = ring_bytes is not None
        total = sum(sizes.values())
        slots, numel = (SLOTS, ring_bytes // (_FP32 * SLOTS)) if ring_bytes else (1, max(1, total))
        self._slots = host_block(slots * numel).view(slots, numel)
        self._stream = CopyStream()

    @property
    def bytes(self) -> int:
        return self._slots.nbytes

    def begin(self, tensors: Sequence[Tensor]) -> "Copying":
        """A copy of `tensors`, flat and in the order of `sizes`, after everything that this thread has
        queued.

        Nothing may change them until `copied` is set, and the previous copy must have been written.
        """
        if [len(tensor) for tensor in tensors] != [*self.sizes.values()]:
            raise RuntimeError("this rank owns other fragments than when its memory was allocated")
        self._stream.follow()
        return Copying(list(tensors), self._slots, self._stream)


@dataclass(frozen=True)
class Copying:
    """One copy, carried out in the thread that writes it."""

    tensors: list[Tensor]
    slots: Tensor
    stream: CopyStream
    copied: Event = field(default_factory=Event)
    """Set when the tensors are copied, or never will be."""

    def pieces(self) -> Iterator[Tensor]:
        """The tensors one after the other, in fp32 pieces [n] that stay valid until the ring wraps around."""
        left = sum(map(len, self.tensors))
        if not left:
            self.copied.set()
        for number, parts in enumerate(_stretches(self.tensors, self.slots.shape[1])):
            sizes = [len(part) for part in parts]
            piece = self.slots[number % len(self.slots), : sum(sizes)]
            self.stream.copy(zip(piece.split(sizes), parts, strict=True))
            left -= len(piece)
            if not left:
                self.copied.set()
            yield piece


def _stretches(tensors: Sequence[Tensor], size: int) -> Iterator[list[Tensor]]:
    """Lists of stretches of the tensors, with `size` elements each; the last may have fewer."""
    parts: list[Tensor] = []
    room = size
    for tensor in tensors:
        while len(tensor) >= room:
            yield [*parts, tensor[:room]]
            tensor, parts, room = tensor[room:], [], size
        if len(tensor):
            parts.append(tensor)
            room -= len(tensor)
    if parts:
        yield parts


def host_copy(engine: DeepSpeedEngine, groups: Groups, config: CheckpointConfig) -> tuple[HostCopy, str]:
    """Memory for this rank's saves, of the same kind on all ranks, and its description.

    Collective: all ranks call it; each tells the others how much it needs before any allocates it.
    """
    sizes = {
        fragment_key(kind, fragment.name, fragment.start): fragment.numel
        for fragment in _saved_fragments(engine, groups)
        for kind in KINDS
    }
    need = Need(socket.gethostname(), _FP32 * sum(sizes.values()), available_memory())
    needs = gather_on_all_ranks(groups, need)
    short = why_too_little(needs, config)
    copy = HostCopy(sizes, config.ring_bytes if short else None)
    memory = f"{'pinned ' if on_gpu() else ''}host memory on each rank"
    if short:
        size = format_bytes(config.ring_bytes)
        return copy, f"a ring of {size} of {memory}, and training waits while one is written: {short}"
    size = format_bytes(max(need.bytes for need in needs))
    return copy, f"{size} of {memory}, and the update after a save waits for the copy alone"


@dataclass(frozen=True)
class Need:
    """Memory that one rank needs for a whole save."""

    host: str
    bytes: int
    available: int
    """Bytes available on its node, for all ranks there."""


def why_too_little(needs: Sequence[Need], config: CheckpointConfig) -> str:
    """Reason why a rank may not hold a whole save, for a log line; empty if all may."""
    for need in needs:
        there = [other for other in needs if other.host == need.host]
        limit = config.copy_limit(min(other.available for other in there) // len(there))
        if need.bytes > limit:
            needed = f"a whole save takes {format_bytes(need.bytes)}"
            return f"{needed}, and a rank on {need.host} may use {format_bytes(limit)}"
    return ""


def saved_tensors(engine: DeepSpeedEngine, groups: Groups) -> list[Tensor]:
    """Tensors that this rank saves, fp32, flat, on its device or in host memory; views, not copies."""
    _ensure_state(engine, groups)
    return [fragment.view(kind) for fragment in _saved_fragments(engine, groups) for kind in KINDS]


def not_finite(engine: DeepSpeedEngine, groups: Groups) -> list[str]:
    """Names of this rank's tensors with a NaN or an infinity. Reads every element."""
    _ensure_state(engine, groups)
    found = [(f, kind) for f in _distinct_fragments(engine, groups) if f.numel for kind in KINDS]
    if not found:
        return []
    # aminmax makes no copy, and gives NaN if one value is; a norm takes a CPU ten times as long
    extremes = [torch.stack(torch.aminmax(f.view(kind))).to(groups.device) for f, kind in found]
    finite = torch.stack(extremes).isfinite().all(dim=1).tolist()  # one synchronisation with the device
    return [
        f"{kind} of {f.name}" for (f, kind), is_finite in zip(found, finite, strict=True) if not is_finite
    ]


def check_finite(found: Sequence[list[str]], step: int) -> None:
    """Raise NumericalError if any rank has found a tensor; `found`: results of `not_finite` by rank."""
    remedy = "start the same command again: it resumes from the newest checkpoint, which is valid"
    problems = [
        Problem(
            f"{len(names)} tensors of the state",
            f"{names[0]} on rank {rank}, ...",
            f"are not finite after step {step:,}, which is therefore not saved",
            remedy,
        )
        for rank, names in enumerate(found)
        if names
    ]
    if problems:
        raise NumericalError(problems)


def _saved_fragments(engine: DeepSpeedEngine, groups: Groups) -> list[Fragment]:
    """Fragments that this rank saves. Each element is saved by one rank alone: at stage 0, where all
    data-parallel ranks have it, by the first."""
    if engine.zero_optimization_stage() == 0 and groups.dp_rank > 0:
        return []
    return _distinct_fragments(engine, groups)


def _distinct_fragments(engine: DeepSpeedEngine, groups: Groups) -> list[Fragment]:
    """Fragments of this rank, except of parameters that the first tensor-parallel rank has too."""
    owned = owned_fragments(engine, groups.dp_rank)
    return [fragment for fragment in owned if groups.tp_rank == 0 or split_of(fragment.name) is not None]


def _ensure_state(engine: DeepSpeedEngine, groups: Groups) -> None:
    owned = owned_fragments(engine, groups.dp_rank)
    if not all(map(has_optimizer_state, owned)):  # no update was applied yet
        create_optimizer_state(owned, 0)
