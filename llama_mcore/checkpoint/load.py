"""Fill a job from a checkpoint: any layout's fragments into any layout's ranks.

A rank reads the stretches that it owns. What it computes with follows from them as after an optimizer step,
so tensor parallelism, data parallelism and ZeRO stage may all differ from those of the run that wrote it.
"""

from deepspeed import DeepSpeedEngine
from torch import Tensor

from llama_mcore.checkpoint.fragments import create_optimizer_state, owned_fragments, set_model_weights
from llama_mcore.checkpoint.layout import WEIGHT
from llama_mcore.checkpoint.reader import CheckpointReader
from llama_mcore.checkpoint.same_model import model_differences
from llama_mcore.config import RunConfig
from llama_mcore.errors import ConfigError
from llama_mcore.observe.phases import Phases
from llama_mcore.parallel.groups import Groups


def check_same_model(reader: CheckpointReader, run: RunConfig) -> None:
    """Refuse to resume with another model. Raises ConfigError with every field that differs."""
    problems = model_differences(reader.path, reader.model, run.model)
    if problems:
        raise ConfigError(problems)


def load_checkpoint(
    engine: DeepSpeedEngine, reader: CheckpointReader, groups: Groups, phases: Phases | None = None
) -> None:
    """Fill weights, masters and Adam moments of this rank.

    The job may be new or have trained before. All ranks call it together: at stages 1 and 2 the weights are
    gathered over the data-parallel group. `phases` are told of every tensor that was read, and beat once.
    """
    phases = phases or Phases()
    fragments = owned_fragments(engine, groups.dp_rank)
    create_optimizer_state(fragments, reader.state.updates)
    layout = groups.tp_rank, groups.tp_size
    for fragment in fragments:
        for kind in reader.kinds:  # moments that are not there begin at zero
            read = reader.local(fragment.name, kind, *layout, fragment.start, fragment.numel)
            fragment.view(kind).copy_(read)
            phases.working()
    phases.beat()

    def full(name: str) -> Tensor:
        phases.working()
        return reader.local(name, WEIGHT, *layout)

    set_model_weights(engine, groups.dp_rank, full)
