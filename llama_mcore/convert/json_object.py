"""The small JSON files beside a checkpoint's tensors: config.json, params.json and their like."""

from pathlib import Path
from typing import Any

from llama_mcore.errors import CheckpointError, MissingInputError, Problem, input_problem, shown
from llama_mcore.small_file import read_json

_LARGEST = 16 << 20


def read_json_object(path: Path) -> dict[str, Any]:
    """Raises MissingInputError where there is no such file, CheckpointError where it holds no JSON object."""
    try:
        content = read_json(path, _LARGEST, follow=True)
    except FileNotFoundError:
        raise MissingInputError(input_problem("file", path)) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(Problem("file", path, f"cannot be read ({shown(error)})")) from None
    if not isinstance(content, dict):
        raise CheckpointError(Problem("file", path, "must hold a JSON object"))
    return content
