"""The mixture is a function of the position, exact to one sample at every prefix."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_mcore.data.mixture import Mixture
from llama_mcore.errors import ConfigError
from tests.support.errors import refused

TABLE_1 = (670, 150, 45, 45, 45, 25, 20)
SHARES = st.lists(st.integers(1, 1000) | st.integers(1, 30), min_size=1, max_size=9).map(tuple)


def sources(shares: tuple[int, ...], first: int, count: int) -> np.ndarray:
    return Mixture(shares).sources_at(np.arange(first, first + count))[0]


def check_quota(shares: tuple[int, ...], found: np.ndarray) -> None:
    """floor(k * share) <= given <= ceil(k * share) for every source and every prefix k; in integers."""
    k = np.arange(1, len(found) + 1)
    for source, share in enumerate(shares):
        given_of_it = np.cumsum(found == source)
        assert (given_of_it * sum(shares) > k * share - sum(shares)).all()
        assert (given_of_it * sum(shares) < k * share + sum(shares)).all()


@settings(max_examples=40, deadline=None)
@given(SHARES)
def test_within_one_sample_of_the_plan_at_every_prefix(shares: tuple[int, ...]) -> None:
    check_quota(shares, sources(shares, 0, 10_000))


@pytest.mark.parametrize("shares", [TABLE_1, (1,) * 100, (999, *(1,) * 50), (1000, 1000, 1), (3, 3, 3, 1)])
def test_shares_that_are_hard_on_simpler_rules(shares: tuple[int, ...]) -> None:
    check_quota(shares, sources(shares, 0, 10_000))


def test_late_in_a_long_run() -> None:
    """The 683,593,750 samples of 1.4T tokens: counts stay exact where floating point would not."""
    shares = (458_009_765, 102_539_063, 30_761_719, 30_761_720, 30_761_718, 17_089_844, 13_671_875)
    late = Mixture(shares)
    for position in (600_000_000, sum(shares)):
        counts = late.counts(position)
        assert sum(counts) == position
        assert all(
            abs(count * sum(shares) - position * share) < sum(shares)
            for count, share in zip(counts, shares, strict=True)
        )
    assert late.counts(sum(shares)) == list(shares)


@settings(max_examples=40, deadline=None)
@given(SHARES, st.integers(0, 5000), st.integers(1, 3000))
def test_each_source_hands_out_its_samples_in_order(shares: tuple[int, ...], first: int, count: int) -> None:
    before = Mixture(shares).counts(first)
    found, indices = Mixture(shares).sources_at(np.arange(first, first + count))
    for source, given_before in enumerate(before):
        mine = indices[found == source]
        assert mine.tolist() == list(range(given_before, given_before + len(mine)))
    after = Mixture(shares).counts(first + count)
    inside = np.bincount(found, minlength=len(shares))
    assert after == [a + int(b) for a, b in zip(before, inside, strict=True)]


@settings(max_examples=30, deadline=None)
@given(SHARES, st.lists(st.integers(0, 20_000), min_size=1, max_size=40))
def test_any_position_alone_gives_what_it_gives_in_the_whole(
    shares: tuple[int, ...], positions: list[int]
) -> None:
    whole, whole_indices = Mixture(shares).sources_at(np.arange(20_001))
    found, indices = Mixture(shares).sources_at(np.array(positions))
    assert found.tolist() == whole[positions].tolist()
    assert indices.tolist() == whole_indices[positions].tolist()


def test_shares_in_the_same_proportion_mix_alike() -> None:
    assert sources((2, 1), 0, 5000).tolist() == sources((20, 10), 0, 5000).tolist()


def test_one_source_is_itself() -> None:
    found, indices = Mixture((7,)).sources_at(np.array([0, 5, 10**12]))
    assert found.tolist() == [0, 0, 0]
    assert indices.tolist() == [0, 5, 10**12]
    assert Mixture((7,)).counts(12) == [12]


@pytest.mark.parametrize("shares", [(0, 5), (1, 2**17), ()])
def test_a_share_too_small_to_plan_for_is_refused(shares: tuple[int, ...]) -> None:
    with refused(ConfigError, "data.sources"):
        Mixture(shares)


def test_the_sequence_of_a_plan_never_changes() -> None:
    """Runs resume by it: these numbers may not change."""
    assert sources(TABLE_1, 0, 24).tolist() == EXPECTED


EXPECTED = [0, 0, 0, 1, 0, 0, 1, 0, 0, 2, 0, 0, 3, 0, 0, 1, 0, 0, 4, 0, 0, 1, 0, 0]


# The last are such that blocks have the least length that forgets: the comparison sees a fiftieth of it.
@pytest.mark.parametrize(
    "shares",
    [
        *(TABLE_1, (97, 89, 83, 79, 73, 71), (500, *(3,) * 20), (3, 3, 3, 1)),
        *((1000, 7, 11, 13, 17, 19, 400, 300), (5000, 3, 7, 11, 1300, 900)),
    ],
)
def test_blocks_do_not_show(shares: tuple[int, ...]) -> None:
    """Blocks, each started from scratch, give what the rule gives that has seen all of the past."""
    assert sources(shares, 0, 15_000).tolist() == by_the_rule(shares, 15_000)


def by_the_rule(shares: tuple[int, ...], count: int) -> list[int]:
    """Each slot goes to the source whose next sample is due first, of those that may have one already."""
    total, given, found = sum(shares), [0] * len(shares), []
    for slot in range(count):
        due = [
            (-(-(n + 1) * total // share), source)
            for source, (n, share) in enumerate(zip(given, shares, strict=True))
            if n * total // share <= slot
        ]
        found.append(min(due)[1])
        given[found[-1]] += 1
    return found
