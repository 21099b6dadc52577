"""Required content of a refusal, however it is worded: the field, its value, and a remedy."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from llama_mcore.errors import LlamaMcoreError, Problem

ANY = object()


@contextmanager
def refused(
    kind: type[LlamaMcoreError], field: str, value: object = ANY, *, remedy: bool = True
) -> Iterator[pytest.ExceptionInfo[LlamaMcoreError]]:
    """The block must raise this error, with a problem of `field`, its value and a remedy."""
    with pytest.raises(kind) as caught:
        yield caught
    check_problem(caught.value.problems, field, value, remedy=remedy)


def check_problem(
    problems: tuple[Problem, ...] | list[Problem], field: str, value: object = ANY, *, remedy: bool = True
) -> Problem:
    """The problem of `field`, which must be there."""
    of_field = [problem for problem in problems if problem.field == field]
    assert of_field, f"no problem of {field} in {[str(problem) for problem in problems]}"
    found = [problem for problem in of_field if value is ANY or str(problem.value) == str(value)]
    assert found, f"{field}: no problem with the value {value!r} in {[str(problem) for problem in of_field]}"
    assert found[0].remedy or not remedy, f"no remedy in {found[0]}"
    return found[0]


def is_shown(output: str, field: str, value: object = ANY, *, remedy: bool = True) -> bool:
    """True if a command has printed a problem of `field` with its value and, unless told else, a remedy."""
    start = f"{field} = " if value is ANY else f"{field} = {value}: "
    lines = [line for line in output.splitlines() if start in line]
    return any("; " in line.partition(start)[2] or not remedy for line in lines)
