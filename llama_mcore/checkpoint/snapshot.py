"""What a save writes, as it was at one moment: copies in host memory, so that training can go on."""

from collections.abc import Mapping, Sequence

import torch
from deepspeed import DeepSpeedEngine
from torch import Tensor

from llama_mcore.checkpoint.fragments import (
    Fragment,
    create_optimizer_state,
    has_optimizer_state,
    owned_fragments,
)
from llama_mcore.checkpoint.layout import KINDS, fragment_key
from llama_mcore.errors import NumericalError, Problem
from llama_mcore.model.sharding import cut_of
from llama_mcore.parallel.device import host_buffer, synchronize
from llama_mcore.parallel.groups import Groups


def snapshot(
    engine: DeepSpeedEngine, groups: Groups, buffers: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Copies of this rank's fragments in host memory, fp32, by their key in the file.

    Every element of the run is in the snapshot of one rank only: at stage 0 the first data-parallel rank has
    it, and what tensor parallelism replicates the first tensor-parallel rank. `buffers`: an older snapshot
    that nobody needs any more; its memory is used again, since to touch new memory takes several times as
    long as to copy.
    """
    if engine.zero_optimization_stage() == 0 and groups.dp_rank > 0:
        return {}
    mine = _saved_fragments(engine, groups)
    copies = {}
    for fragment in mine:
        for kind in KINDS:
            key = fragment_key(kind, fragment.name, fragment.start)
            copies[key] = buffers[key] if buffers else host_buffer(fragment.numel)
            copies[key].copy_(fragment.view(kind), non_blocking=True)
    synchronize()  # copies from a GPU are on their way until then
    return copies


def not_finite(engine: DeepSpeedEngine, groups: Groups) -> list[str]:
    """What of this rank's part of a snapshot of now would hold a NaN or an infinity, by name.

    Looks at every element, on the device.
    """
    return [
        f"{kind} of {fragment.name}"
        for fragment in _saved_fragments(engine, groups)
        for kind in KINDS
        if not _is_finite(fragment.view(kind))
    ]


def check_finite(found: Sequence[list[str]], step: int) -> None:
    """Raise NumericalError where any rank has something; `found`: what `not_finite` gave, by rank."""
    remedy = "start the same command again: it goes on from the newest checkpoint, which is sound"
    problems = [
        Problem(
            f"{len(names)} tensors of the state",
            f"{names[0]} on rank {rank}, ...",
            f"are not finite after step {step:,}, so that it is not saved",
            remedy,
        )
        for rank, names in enumerate(found)
        if names
    ]
    if problems:
        raise NumericalError(problems)


def _is_finite(values: Tensor) -> bool:
    """Whether all elements are. The largest absolute value needs no copy, and is NaN if one of them is."""
    return not values.numel() or bool(torch.linalg.vector_norm(values, torch.inf).isfinite())


def _saved_fragments(engine: DeepSpeedEngine, groups: Groups) -> list[Fragment]:
    """This rank's, without those of parameters that the first tensor-parallel rank has too."""
    owned = owned_fragments(engine, groups.dp_rank)
    if not all(map(has_optimizer_state, owned)):  # no update was applied yet
        create_optimizer_state(owned, 0)
    return [fragment for fragment in owned if groups.tp_rank == 0 or cut_of(fragment.name) is not None]
