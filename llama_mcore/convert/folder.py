"""Contents that folders of several formats share: JSON files, tokenizer.model, tensors by name."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from llama_mcore.checkpoint.durable_io import write_file
from llama_mcore.convert.model_weights import Weights
from llama_mcore.errors import CheckpointError, MissingInputError, Problem, input_problem, shown
from llama_mcore.model.config import ModelConfig
from llama_mcore.small_file import read_json

TOKENIZER_MODEL = "tokenizer.model"
RECEIPT = "conversion.json"
"""Written by `convert` into its output: where that comes from, and which files are its own."""
_LARGEST_JSON = 16 << 20


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises MissingInputError, or CheckpointError for any other content."""
    try:
        content = read_json(path, _LARGEST_JSON, follow=True)
    except FileNotFoundError:
        raise MissingInputError(input_problem("file", path)) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(Problem("file", path, f"cannot be read ({shown(error)})")) from None
    if not isinstance(content, dict):
        raise CheckpointError(Problem("file", path, "must hold a JSON object"))
    return content


def parsed_model(fields: object, path: Path | str) -> ModelConfig:
    """The model that the fields of a ModelConfig, found in `path`, describe. Raises CheckpointError."""
    try:
        return ModelConfig.model_validate(fields)
    except ValidationError as error:
        reason = shown(" ".join(str(error).split()))
        raise CheckpointError(Problem("file", path, f"does not describe a model ({reason})")) from None


def name_problems(expected: Collection[str], found: Collection[str], place: Path) -> list[Problem]:
    """Tensors that are missing from `place`, and tensors there that the model does not have."""
    missing = [Problem("tensor", name, f"is missing from {place}") for name in expected if name not in found]
    return missing + [
        Problem("tensor", shown(name), f"is in {place}, but not part of this model")
        for name in found
        if name not in expected
    ]


def tokenizer_in(folder: Path) -> Path | None:
    path = folder / TOKENIZER_MODEL
    return path if path.is_file() else None


def write_tokenizer(weights: Weights, folder: Path) -> None:
    """Copy the tokenizer of `weights`, where there is one."""
    if weights.tokenizer:
        write_file(folder / TOKENIZER_MODEL, [weights.tokenizer.read_bytes()])
