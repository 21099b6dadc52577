"""Arguments of `llama-mcore plan`, all that is wrong with them told at once. Imports no torch."""

from collections.abc import Callable, Mapping
from typing import Any

from llama_mcore.errors import ConfigError, Problem
from llama_mcore.plan.layout.hardware import Gpu
from llama_mcore.plan.layout.hardware import gpu as gpu_named
from llama_mcore.units import parse_count


def number(
    problems: list[Problem], field: str, text: str, at_least: float, at_most: float, whole: bool = False
) -> float:
    """`text` as a number; what is wrong with it joins `problems`."""
    try:
        return parse_count(field, text, at_least, at_most, whole)
    except ConfigError as error:
        problems += error.problems
        return at_least


def listed_gpu(problems: list[Problem], name: str) -> Gpu | None:
    """A GPU by its name; an unknown one joins `problems`."""
    try:
        return gpu_named(name)
    except ConfigError as error:
        problems += error.problems
        return None


def one_of(options: Mapping[str, object]) -> None:
    """Raises ConfigError where more than one was given of options that exclude each other."""
    given = [option for option, value in options.items() if value]
    if len(given) > 1:
        raise ConfigError(Problem(given[1], "(given)", f"says nothing beside {given[0]}", "drop one of them"))


def all_of(*parts: Callable[[], Any]) -> tuple[Any, ...]:
    """What each of `parts` returns. Raises one ConfigError with what is wrong in any of them."""
    found, problems = [], list[Problem]()
    for part in parts:
        try:
            found.append(part())
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    return tuple(found)
