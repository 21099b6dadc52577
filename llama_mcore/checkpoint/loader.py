"""Fill a job from a checkpoint: any layout's fragments into any layout's ranks.

A rank reads the stretches that it owns. What it computes with follows from them as after an optimizer step,
so tensor parallelism, data parallelism and ZeRO stage may all differ from those of the run that wrote it.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from deepspeed import DeepSpeedEngine
from torch import Tensor

from llama_mcore.checkpoint.optimizer_shards import (
    Fragment,
    create_optimizer_state,
    owned_fragments,
    set_model_weights,
)
from llama_mcore.checkpoint.paths import WEIGHT
from llama_mcore.checkpoint.reader import CheckpointReader
from llama_mcore.checkpoint.same_model import model_differences
from llama_mcore.config.schema import RunConfig
from llama_mcore.distributed.device import CopyStream, host_block
from llama_mcore.distributed.groups import Groups
from llama_mcore.errors import ConfigError
from llama_mcore.observe.phases import Phases

SLOT = 16 << 20
"""Elements that are read ahead while as many are copied to the device: 64 MiB."""


def check_same_model(reader: CheckpointReader, run: RunConfig) -> None:
    """Refuse to resume with another model. Raises ConfigError with every field that differs."""
    problems = model_differences(reader.path, reader.model, run.model)
    if problems:
        raise ConfigError(problems)


def load_checkpoint(
    engine: DeepSpeedEngine,
    reader: CheckpointReader,
    groups: Groups,
    phases: Phases | None = None,
    *,
    weights_alone: bool = False,
) -> None:
    """Fill weights, masters and Adam moments of this rank; of `weights_alone` the moments are zero and count
    no steps.

    The job may be new or have trained before. All ranks call it together: at stages 1 and 2 the weights are
    gathered over the data-parallel group. `phases` are told of every piece that was read, and beat once.
    """
    phases = phases or Phases()
    fragments = owned_fragments(engine, groups.dp_rank)
    create_optimizer_state(fragments, 0 if weights_alone else reader.state.updates)
    _fill(fragments, reader, (WEIGHT,) if weights_alone else reader.kinds, groups, phases)
    phases.beat()

    def full(name: str) -> Tensor:
        phases.progress()
        return reader.local(name, WEIGHT, groups.tp_rank, groups.tp_size)

    set_model_weights(engine, groups.dp_rank, full)


def _fill(
    fragments: Sequence[Fragment],
    reader: CheckpointReader,
    kinds: Sequence[str],
    groups: Groups,
    phases: Phases,
) -> None:
    """Read a piece into one slot of host memory while the one before is copied out of the other."""
    pieces = [
        (fragment, kind, *stretch)
        for fragment in fragments
        for kind in kinds  # moments that are not there begin at zero
        for stretch in _stretches(fragment.numel)
    ]
    if not pieces:
        return
    slots = host_block(2 * max(numel for *_, numel in pieces)).chunk(2)
    stream = CopyStream()
    stream.follow()

    def read(number: int) -> Tensor:
        fragment, kind, first, numel = pieces[number]
        layout = groups.tp_rank, groups.tp_size
        found = reader.local(fragment.name, kind, *layout, fragment.start + first, numel)
        return slots[number % 2][:numel].copy_(found)

    with ThreadPoolExecutor(1) as ahead:
        reading = ahead.submit(read, 0)
        for number, (fragment, kind, first, numel) in enumerate(pieces):
            piece = reading.result()
            if number + 1 < len(pieces):
                reading = ahead.submit(read, number + 1)
            stream.copy([(fragment.view(kind).narrow(0, first, numel), piece)])
            phases.progress()


def _stretches(numel: int) -> Iterator[tuple[int, int]]:
    """(start, length) of the pieces that a fragment is read in."""
    return ((start, min(SLOT, numel - start)) for start in range(0, numel, SLOT))
