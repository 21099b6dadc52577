"""Parsing of arguments of `llama-mcore plan`, with all problems reported at once. Imports no torch."""

from collections.abc import Callable, Mapping
from typing import Any

from llama_mcore.errors import ConfigError, Problem


def one_of(options: Mapping[str, object]) -> None:
    """Raise ConfigError if more than one of options that exclude each other was given."""
    given = [option for option, value in options.items() if value]
    if len(given) > 1:
        raise ConfigError(
            Problem(given[1], "(given)", f"cannot be combined with {given[0]}", "drop one of them")
        )


def all_of(*parts: Callable[[], Any]) -> tuple[Any, ...]:
    """Results of all `parts`. Raises one ConfigError with the problems of all of them."""
    found, problems = [], list[Problem]()
    for part in parts:
        try:
            found.append(part())
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    return tuple(found)
