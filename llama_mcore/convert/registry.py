"""Formats by name: the four functions that each offers, and the format that a folder is in."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import torch

from llama_mcore.checkpoint.manifest import changed_fields
from llama_mcore.checkpoint.paths import unreadable
from llama_mcore.convert.model_weights import Weights
from llama_mcore.errors import ConfigError, MissingInputError, Problem, input_problem
from llama_mcore.model.config import ModelConfig

NAMES = ("native", "hf", "meta", "megatron", "deepspeed")
"""Each names the FORMAT of a module in formats/."""
_MODULES = {"hf": "huggingface"}


@dataclass(frozen=True)
class WriteOptions:
    dtype: torch.dtype
    """Dtype of the weights in the files. `Weights` have it already, unless masters are written too: then they
    are fp32, and formats that keep both round the weights."""
    kinds: tuple[str, ...]
    """The weights alone, or masters and moments too."""
    tp: int = 1
    """Tensor-parallel ranks to split the files for, in formats with a file per rank."""
    max_shard_bytes: int = 5_000_000_000


Advance = Callable[[int], None]
"""Called with the bytes of each tensor that was written."""


@dataclass(frozen=True)
class Format:
    name: str
    found_in: Callable[[Path], bool]
    """True if a folder looks like one of this format. Opens nothing that may be large or hostile."""
    open: Callable[[Path, ModelConfig | None], Weights]
    """Reads indices and checks that every tensor of the model is there, in its shape, and no other.

    The ModelConfig is the one that the user names, for folders that do not say what model they hold; where
    both do they must agree. Raises CheckpointError with everything that is wrong, MissingInputError.
    """
    write: Callable[[Weights, Path, WriteOptions, Advance], None]
    """Fills an existing empty folder, a tensor at a time, and waits until all of it is on the disk.

    Raises ConfigError for a model or options that the format cannot express, before it writes; OSError.
    """
    is_cut: bool
    """True if it has a file per tensor-parallel rank, so that WriteOptions.tp matters."""
    has_optimizer: bool
    """True if it can hold masters and moments."""
    fp32_only: bool = False
    """True if its weights are the masters."""


def get_format(name: str, flag: str) -> Format:
    """The format called `name`. Raises ConfigError for an unknown name that `flag` gave."""
    if name not in NAMES:
        raise ConfigError(Problem(flag, name, "is not a known format", f"known: {', '.join(NAMES)}"))
    found: Format = import_module(f"{__package__}.formats.{_MODULES.get(name, name)}").FORMAT
    return found


def looks_like(path: Path) -> list[Format]:
    """Every format that a folder could be in."""
    return [each for each in (get_format(name, "--from") for name in NAMES) if each.found_in(path)]


def detect(path: Path, flag: str = "--from") -> Format:
    """The format of the folder `path`. Raises ConfigError if it looks like none or several."""
    found = looks_like(path)
    if len(found) == 1:
        return found[0]
    looks = f"looks like {' and '.join(each.name for each in found)}" if found else "is in no known format"
    raise ConfigError(Problem(flag, "(not given)", f"{path} {looks}", f"give one of {', '.join(NAMES)}"))


def check_there(path: Path, field: str = "--input") -> None:
    """Raise MissingInputError under `field` where `path` does not exist."""
    if not path.exists():
        raise MissingInputError(input_problem(field, path))


def check_native(path: Path, remedy: str) -> None:
    """Raise MissingInputError for a checkpoint of another format; a folder of no format passes, for its
    reader to refuse."""
    try:
        names = [each.name for each in looks_like(path)] if path.is_dir() else []
    except OSError as error:
        raise unreadable(error) from None
    if names and "native" not in names:
        reason = f"is a checkpoint in the format {' or '.join(names)}, not one of a run"
        raise MissingInputError(Problem("folder", path, reason, remedy))


def check_named(named: ModelConfig | None, found: ModelConfig, place: Path) -> None:
    """Raise ConfigError where the model that the user names is not the one in the folder."""
    if fields := changed_fields(named, found) if named else []:
        raise ConfigError(
            [
                Problem(
                    f"--model: {name}",
                    getattr(named, name),
                    f"is {getattr(found, name)} in {place}",
                    "leave --model out",
                )
                for name in fields
            ]
        )
