import pickle

from llama_mcore.errors import CheckpointError, Problem


def test_an_error_crosses_ranks_whole() -> None:
    """Collectives of Python objects pickle them."""
    error = CheckpointError([Problem("a", 1, "is wrong", "mend it"), Problem("b", 2, "too")])
    arrived = pickle.loads(pickle.dumps(error))
    assert type(arrived) is CheckpointError
    assert arrived.problems == error.problems
    assert (
        str(arrived)
        == str(error)
        == "checkpoint error: 2 problems\n  - a = 1: is wrong; mend it\n  - b = 2: too"
    )
