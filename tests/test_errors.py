import pickle

import pytest

from llama_mcore.errors import (
    CheckpointError,
    ConfigError,
    LlamaMcoreError,
    MissingInputError,
    OutputError,
    Problem,
    gathering,
    raise_all,
)


def test_an_error_crosses_ranks_whole() -> None:
    """Collectives of Python objects pickle them."""
    error = CheckpointError([Problem("a", 1, "is wrong", "fix it"), Problem("b", 2, "too")])
    arrived = pickle.loads(pickle.dumps(error))
    assert type(arrived) is CheckpointError
    assert arrived.problems == error.problems
    assert (
        str(arrived)
        == str(error)
        == "checkpoint error: 2 problems\n  - a = 1: is wrong; fix it\n  - b = 2: too"
    )


def raised(*errors: LlamaMcoreError) -> LlamaMcoreError:
    gathered: list[LlamaMcoreError] = []
    for error in errors:
        with gathering(gathered):
            raise error
    with pytest.raises(LlamaMcoreError) as caught:
        raise_all(gathered)
    return caught.value


def test_errors_of_one_kind_are_told_as_that_kind() -> None:
    missing = [MissingInputError(Problem(name, "x", "is not there")) for name in "ab"]
    assert type(raised(*missing)) is MissingInputError
    assert [problem.field for problem in raised(*missing).problems] == ["a", "b"]
    assert type(raised(*missing, OutputError(Problem("c", "y", "is there")))) is ConfigError


def test_no_errors_raise_nothing() -> None:
    errors: list[LlamaMcoreError] = []
    with gathering(errors):
        pass
    raise_all(errors)
    assert errors == []
