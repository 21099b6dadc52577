"""Weights of any checkpoint that a user names, and the model where the checkpoint does not describe it."""

from pathlib import Path

from pydantic import ValidationError

from llama_mcore.config.load import LARGEST_CONFIG, load_config
from llama_mcore.convert.formats.huggingface.config import model_of
from llama_mcore.convert.model_weights import Weights
from llama_mcore.convert.registry import check_there, detect, get_format
from llama_mcore.errors import ConfigError, Problem, shown
from llama_mcore.model.config import PRESETS, ModelConfig
from llama_mcore.small_file import read_json


def open_weights(
    path: Path, source: str | None = None, model: str | None = None, field: str = "--checkpoint"
) -> Weights:
    """Weights of a checkpoint, or of a run's newest; in the format `source`, if given, and of the model that
    the user names, if needed. Raises MissingInputError under `field` where there is none."""
    check_there(path, field)
    found = get_format(source, "--from") if source else detect(path)
    return found.open(path, named_model(model) if model else None)


def named_model(name: str) -> ModelConfig:
    """A preset, the model of a run's YAML file, or of a Hugging Face config.json. Raises ConfigError."""
    if name in PRESETS:
        return ModelConfig(**PRESETS[name])
    path = Path(name)
    remedy = f"give one of {', '.join(PRESETS)}, a run's YAML file, or a config.json of Hugging Face"
    if not path.is_file():
        raise ConfigError(Problem("--model", name, "is neither a preset nor a file", remedy))
    if path.suffix == ".json":
        try:
            return model_of(read_json(path, LARGEST_CONFIG, follow=True))
        except (OSError, ValueError, ValidationError, AttributeError) as error:
            raise ConfigError(Problem("--model", name, f"cannot be read ({shown(error)})", remedy)) from None
    return load_config(name).model
