"""llama_mcore.parallel.overlap: collectives beside computation give what plain sums and joins give."""

import pytest

from tests.parallel.conftest import Results


@pytest.mark.parametrize("size", [2, 4])
def test_results_are_the_plain_ones(results: Results, size: int) -> None:
    """With and without sequence parallelism; worker.py compares with sums of whole numbers."""
    assert results(f"overlap-{size}", size) == [[]] * size
