"""The DeepSpeed file of a run, found, read and checked; train/ds_config.py fills it. Loads no torch."""

from pathlib import Path
from typing import Any

from llama_mcore.errors import ConfigError, MissingInputError, Problem, input_problem, shown
from llama_mcore.parallel.config import ZeroConfig
from llama_mcore.small_file import read_json

CHECKOUT = Path(__file__).parents[2]
_LARGEST = 1 << 20
_SECTIONS = ("bf16", "data_types", "zero_optimization", "zero_optimization.offload_optimizer")
_SIZES = ("zero_optimization.reduce_bucket_size", "zero_optimization.stage3_prefetch_bucket_size")


def read_ds_file(zero: ZeroConfig) -> tuple[Path, dict[str, Any]]:
    """Where it is, and what it says, with "auto" where we own the value.

    Raises MissingInputError if it is not there, ConfigError if it is not JSON or what is read of it here has
    another type than DeepSpeed takes.
    """
    path = _path(zero)
    try:
        content = read_json(path.resolve(), _LARGEST)
    except (OSError, ValueError) as error:
        raise ConfigError(Problem("zero.config", path, f"is not JSON ({shown(error)})")) from None
    if not isinstance(content, dict):
        raise ConfigError(Problem("zero.config", path, "must hold one JSON object"))
    if problems := _wrong_types(content, path):
        raise ConfigError(problems)
    return path, content


def offloads_optimizer(zero_optimization: dict[str, Any]) -> bool:
    """Whether masters and moments are in host memory."""
    return zero_optimization.get("offload_optimizer", {}).get("device", "none") != "none"


def _path(zero: ZeroConfig) -> Path:
    # Stage 0 exists as a reference and differs from stage 1 in nothing that a file could say.
    name = zero.config or f"ds_configs/zero{max(1, zero.stage)}.json"
    for path in (Path(name), CHECKOUT / name):
        if path.is_file():
            return path
    raise MissingInputError(input_problem("zero.config", name, "see ds_configs/README.md"))


def _wrong_types(content: dict[str, Any], path: Path) -> list[Problem]:
    problems = []
    for key in _SECTIONS:
        if not isinstance(value := _at(content, key, {}), dict):
            problems.append(Problem(key, shown(value), f"in {path} must be an object", "see ds_configs/"))
    for key in _SIZES:
        # DeepSpeed takes 5e8 too
        value = _at(content, key, 1)
        if not isinstance(value, int | float) or isinstance(value, bool) or value < 1 or value % 1:
            bound = f"in {path} must be a whole number of values from 1 on"
            problems.append(Problem(key, shown(value), bound, "e.g. 200000000"))
    return problems


def _at(content: Any, key: str, default: Any) -> Any:
    """What is at a dotted key; `default` if there is nothing."""
    for part in key.split("."):
        if not isinstance(content, dict) or part not in content:
            return default
        content = content[part]
    return content
