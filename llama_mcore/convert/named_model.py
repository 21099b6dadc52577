"""The model that a user names for a folder that does not say what it holds."""

from pathlib import Path

from pydantic import ValidationError

from llama_mcore.config.load import LARGEST_CONFIG, load_config
from llama_mcore.errors import ConfigError, Problem, shown
from llama_mcore.model.config import PRESETS, ModelConfig
from llama_mcore.small_file import read_json

_REMEDY = f"give one of {', '.join(PRESETS)}, a run's YAML file, or a config.json of Hugging Face"


def named_model(name: str) -> ModelConfig:
    """A preset, the model of a run's YAML file, or of a Hugging Face config.json. Raises ConfigError."""
    if name in PRESETS:
        return ModelConfig(**PRESETS[name])
    path = Path(name)
    if not path.is_file():
        raise ConfigError(Problem("--model", name, "is no preset and no file", _REMEDY))
    if path.suffix == ".json":
        from llama_mcore.convert.formats.huggingface import model_of

        try:
            return model_of(read_json(path, LARGEST_CONFIG, follow=True))
        except (OSError, ValueError, ValidationError, AttributeError) as error:
            raise ConfigError(Problem("--model", name, f"cannot be read ({shown(error)})", _REMEDY)) from None
    return load_config(name).model
