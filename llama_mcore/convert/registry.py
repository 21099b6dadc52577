"""The formats, a module each: what a module offers, and which of them a folder is in."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import torch

from llama_mcore.checkpoint.paths import unreadable
from llama_mcore.convert.model_weights import Weights
from llama_mcore.errors import ConfigError, MissingInputError, Problem, input_problem
from llama_mcore.model.config import ModelConfig

NAMES = ("native", "hf", "meta", "megatron", "deepspeed")
"""Each is the FORMAT of a module in formats/."""
_MODULES = {"hf": "huggingface"}


@dataclass(frozen=True)
class WriteOptions:
    dtype: torch.dtype
    """Of the weights in the files. `Weights` are in it already, unless masters are to be written too: then
    they are fp32, and files that have both take the weights rounded from them."""
    kinds: tuple[str, ...]
    """What to write: the weights, or masters and moments too."""
    tp: int = 1
    """Tensor-parallel ranks to cut the files for, where a format is cut at all."""
    max_shard_bytes: int = 5_000_000_000


Advance = Callable[[int], None]
"""Told the bytes of each tensor that was written."""


@dataclass(frozen=True)
class Format:
    name: str
    found_in: Callable[[Path], bool]
    """Whether a folder looks like one of this format. Opens nothing that may be large or hostile."""
    open: Callable[[Path, ModelConfig | None], Weights]
    """Reads indices and checks that every tensor of the model is there, in its shape, and no other.

    The ModelConfig is the one that the user names, for folders that do not say what model they hold; where
    both do they must agree. Raises CheckpointError with all that is wrong, MissingInputError.
    """
    write: Callable[[Weights, Path, WriteOptions, Advance], None]
    """Fills an existing empty folder, a tensor at a time, and waits until all of it is on the disk.

    Raises ConfigError for a model or options that the format cannot express, before it writes; OSError.
    """
    is_cut: bool
    """Whether WriteOptions.tp says something to it."""
    has_optimizer: bool
    """Whether it can hold masters and moments."""
    fp32_only: bool = False
    """Whether its weights are the masters."""


def get_format(name: str, flag: str) -> Format:
    """Raises ConfigError for a name that is none, under the flag that gave it."""
    if name not in NAMES:
        raise ConfigError(Problem(flag, name, "is not a known format", f"known: {', '.join(NAMES)}"))
    found: Format = import_module(f"{__package__}.formats.{_MODULES.get(name, name)}").FORMAT
    return found


def check_there(path: Path, field: str = "--input") -> None:
    """Raises MissingInputError that names `field`."""
    if not path.exists():
        raise MissingInputError(input_problem(field, path))


def looks_like(path: Path) -> list[Format]:
    """Every format that a folder could be of."""
    return [each for each in (get_format(name, "--from") for name in NAMES) if each.found_in(path)]


def detect(path: Path, flag: str = "--from") -> Format:
    """The format of what is at `path`. Raises ConfigError if it is none or several."""
    found = looks_like(path)
    if len(found) == 1:
        return found[0]
    looks = f"looks like {' and '.join(each.name for each in found)}" if found else "is of no known format"
    raise ConfigError(Problem(flag, "(not given)", f"{path} {looks}", f"give one of {', '.join(NAMES)}"))


# How a model is computed, and how it was once drawn, is no part of what it is.
NOT_CARRIED = frozenset({"attention", "kernels", "recompute", "init_std"})


def same_model(one: ModelConfig, other: ModelConfig) -> list[str]:
    """Fields in which two models are not the same one; empty if they are."""
    left, right = one.model_dump(), other.model_dump()
    return [field for field in left if field not in NOT_CARRIED and left[field] != right[field]]


def check_named(named: ModelConfig | None, found: ModelConfig, place: Path) -> None:
    """ConfigError where the model that the user names is not the one that a folder says it holds."""
    fields = same_model(named, found) if named else []
    if fields:
        raise ConfigError(
            [
                Problem(f"--model: {field}", getattr(named, field), f"is {getattr(found, field)} in {place}")
                for field in fields
            ]
        )


def check_native(path: Path, remedy: str) -> None:
    """MissingInputError for a checkpoint of another format; what is of none is for others to tell."""
    try:
        names = [each.name for each in looks_like(path)] if path.is_dir() else []
    except OSError as error:
        raise unreadable(error) from None
    if names and "native" not in names:
        reason = f"is no checkpoint of a run here, but one of another format: {' or '.join(names)}"
        raise MissingInputError(Problem("folder", path, reason, remedy))
