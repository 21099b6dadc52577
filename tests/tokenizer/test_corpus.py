import tracemalloc
from collections import Counter
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_mcore.tokenizer.corpus import Reservoir


def sample(lines: Iterable[bytes], budget: int, seed: str = "0") -> list[bytes]:
    reservoir = Reservoir(budget, seed)
    for line in lines:
        reservoir.add(line)
    return reservoir.sample()


def numbered(count: int, size: int = 10) -> list[bytes]:
    return [b"%0*d" % (size, number) for number in range(count)]


def test_sample_keeps_everything_that_fits() -> None:
    lines = numbered(100)
    assert sample(lines, 1000) == lines
    assert len(sample(lines, 999)) == 99


def test_sample_fills_its_budget_and_keeps_to_it() -> None:
    lines = [b"x" * (1 + number % 90) for number in range(20_000)]
    size = sum(map(len, sample(lines, 10_000)))
    assert 10_000 - 90 <= size <= 10_000


def test_sample_keeps_the_order_of_the_text() -> None:
    kept = sample(numbered(10_000), 5_000)
    assert kept == sorted(kept)


@given(
    lines=st.lists(st.binary(min_size=1, max_size=30), max_size=200),
    budget=st.integers(min_value=30, max_value=2_000),
    seed=st.text(max_size=3),
)
def test_the_same_seed_gives_the_same_sample_within_the_budget(
    lines: list[bytes], budget: int, seed: str
) -> None:
    kept = sample(lines, budget, seed)
    assert kept == sample(lines, budget, seed)
    assert sum(map(len, kept)) <= budget
    assert not Counter(kept) - Counter(lines)
    if sum(map(len, lines)) <= budget:
        assert kept == lines


@given(sizes=st.lists(st.integers(min_value=1, max_value=40), min_size=1, max_size=300))
def test_sample_may_be_read_along_the_way(sizes: list[int]) -> None:
    lines = [b"x" * size for size in sizes]
    asked = Reservoir(100, "0")
    for line in lines:
        asked.add(line)
        asked.sample()
    assert asked.sample() == sample(lines, 100)


def test_seeds_differ() -> None:
    lines = numbered(1_000)
    assert len({tuple(sample(lines, 1_000, str(seed))) for seed in range(20)}) == 20


def test_sample_takes_every_line_with_the_same_probability() -> None:
    lines = numbered(200)
    drawn = Counter(line for seed in range(500) for line in sample(lines, 500, str(seed)))
    # 50 of 200 lines, 500 times: each 125 times on average, with a standard deviation of 9.7.
    assert all(abs(drawn[line] - 125) < 5 * 9.7 for line in lines)
    by_quarter = [sum(drawn[line] for line in lines[first : first + 50]) for first in range(0, 200, 50)]
    assert max(by_quarter) - min(by_quarter) < 500


def test_sample_takes_long_lines_like_short_ones() -> None:
    lines = [b"s%09d" % n if n % 2 else b"l%099d" % n for n in range(20_000)]
    kept = sample(lines, 110_000)
    assert sum(line.startswith(b"l") for line in kept) / len(kept) == pytest.approx(0.5, abs=0.05)


def test_sample_bounds_memory_by_the_budget() -> None:
    tracemalloc.start()
    sample((b"%0100d" % number for number in range(100_000)), 500_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * 500_000
