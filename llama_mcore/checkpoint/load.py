"""Fill a job from a checkpoint: any layout's fragments into any layout's ranks.

A parameter's fragments are joined to the full tensor and the rank at hand cuts out what it needs, so tensor
parallelism, data parallelism and ZeRO stage may all differ from those of the run that wrote it.
"""

from deepspeed import DeepSpeedEngine
from torch import Tensor

from llama_mcore.checkpoint.fragments import (
    Fragment,
    create_optimizer_state,
    owned_fragments,
    set_model_weight,
)
from llama_mcore.checkpoint.layout import KINDS, WEIGHT
from llama_mcore.checkpoint.reader import CheckpointReader
from llama_mcore.config import RunConfig
from llama_mcore.errors import ConfigError, Problem
from llama_mcore.model.sharding import cut_of, shard
from llama_mcore.parallel.groups import Groups

# How the same model is computed may change between the run that saved and the one that resumes.
COMPUTED_WITH = {"recompute", "attention", "kernels", "layer"}


def check_same_model(reader: CheckpointReader, run: RunConfig) -> None:
    """Refuse to resume with another model. Raises ConfigError with every field that differs."""
    saved, wanted = reader.model.model_dump(), run.model.model_dump()
    problems = [
        Problem(
            f"model.{field}",
            wanted[field],
            f"differs from {saved[field]} in the checkpoint {reader.path}",
            f"set it to {saved[field]}, or start anew in another run.dir",
        )
        for field in wanted
        if field not in COMPUTED_WITH and wanted[field] != saved[field]
    ]
    if problems:
        raise ConfigError(problems)


def load_checkpoint(engine: DeepSpeedEngine, reader: CheckpointReader, groups: Groups) -> None:
    """Fill weights, masters and Adam moments of this rank. No collective runs."""
    fragments = owned_fragments(engine, groups.dp_rank)
    create_optimizer_state(fragments, reader.state.step)
    by_name = {fragment.name: fragment for fragment in fragments}
    for name, parameter in engine.module.named_parameters():
        for kind in KINDS:
            local = shard(reader.full(name, kind), cut_of(name), groups.tp_rank, groups.tp_size)
            _fill(by_name.get(name), kind, local)
            if kind == WEIGHT:
                set_model_weight(parameter, local, groups.dp_rank)


def _fill(fragment: Fragment | None, kind: str, local: Tensor) -> None:
    if fragment is not None:
        wanted = local.reshape(-1)[fragment.start : fragment.start + fragment.numel]
        fragment.view(kind).copy_(wanted)
