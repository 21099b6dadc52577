"""What a save writes, as it was at one moment: copies in host memory, so that training can go on."""

from collections.abc import Mapping

from deepspeed import DeepSpeedEngine
from torch import Tensor

from llama_mcore.checkpoint.fragments import owned_fragments
from llama_mcore.checkpoint.layout import KINDS, fragment_key
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
    mine = [
        fragment
        for fragment in owned_fragments(engine, groups.dp_rank)
        if groups.tp_rank == 0 or cut_of(fragment.name) is not None
    ]
    copies = {}
    for fragment in mine:
        for kind in KINDS:
            key = fragment_key(kind, fragment.name, fragment.start)
            copies[key] = buffers[key] if buffers else host_buffer(fragment.numel)
            copies[key].copy_(fragment.view(kind), non_blocking=True)
    synchronize()  # copies from a GPU are on their way until then
    return copies
