"""llama_mcore.parallel.groups: who is whose neighbour, and the end of the groups on every path."""

from tests.parallel.conftest import Results

GONE = [False, False]  # neither torch's groups nor megatron-core's


def test_ranks_of_a_tensor_parallel_group_are_consecutive(results: Results) -> None:
    found = results("groups", 4)
    assert [rank["world"] for rank in found] == [[0, 4], [1, 4], [2, 4], [3, 4]]
    assert [rank["tp"] for rank in found] == [[0, 2, 0, 1], [1, 2, 0, 1], [0, 2, 2, 3], [1, 2, 2, 3]]
    assert [rank["dp"] for rank in found] == [[0, 2, 0, 2], [0, 2, 1, 3], [1, 2, 0, 2], [1, 2, 1, 3]]


def test_groups_are_torn_down_at_the_end(results: Results) -> None:
    assert [rank["left"] for rank in results("groups", 4)] == [GONE] * 4


def test_groups_are_torn_down_when_the_body_raises(results: Results) -> None:
    other, raised = results("raising", 2)
    assert raised == {"error": "of the body", "left": GONE}
    assert other["left"] == GONE
    assert "of the body" not in str(other["error"])


def test_one_process_needs_no_launcher(results: Results) -> None:
    assert results("alone", 1) == [{"found": [0, 1, 1, 1], "left": GONE}]
