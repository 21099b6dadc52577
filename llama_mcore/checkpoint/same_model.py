"""Whether a checkpoint is of the model that a run trains. Loads no torch."""

from pathlib import Path

from llama_mcore.errors import Problem
from llama_mcore.model.config import ModelConfig

# How a model is computed may change between the run that saved and the one that goes on, and so may how it
# would be drawn: it is not.
MAY_CHANGE = {"recompute", "attention", "kernels", "init_std"}


def model_differences(path: Path, saved: ModelConfig, wanted: ModelConfig) -> list[Problem]:
    """Every field of the model in the checkpoint `path` that a run of another one would have to set."""
    before, now = saved.model_dump(), wanted.model_dump()
    return [
        Problem(
            f"model.{field}",
            now[field],
            f"differs from {before[field]} in the checkpoint {path}",
            f"set it to {before[field]}, or start anew in another run.dir",
        )
        for field in now
        if field not in MAY_CHANGE and now[field] != before[field]
    ]
