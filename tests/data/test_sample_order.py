import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from llama_mcore.data.sample_order import windows_at

SEEDS = st.integers(-(2**63), 2**64 - 1)


def epoch(number: int, num_windows: int, seed: int) -> list[int]:
    positions = np.arange(number * num_windows, (number + 1) * num_windows)
    return windows_at(positions, num_windows, seed).tolist()


@given(num_windows=st.integers(1, 700), seed=SEEDS, number=st.integers(0, 10**9))
def test_every_window_once_an_epoch(num_windows: int, seed: int, number: int) -> None:
    assert sorted(epoch(number, num_windows, seed)) == list(range(num_windows))


@given(num_windows=st.integers(1, 2**40), seed=SEEDS, positions=st.lists(st.integers(0, 2**62), max_size=20))
def test_a_position_does_not_depend_on_its_neighbours(
    num_windows: int, seed: int, positions: list[int]
) -> None:
    windows = windows_at(np.array(positions, dtype=np.int64), num_windows, seed).tolist()
    assert windows == [windows_at(np.array([place]), num_windows, seed).item() for place in positions]
    assert all(0 <= window < num_windows for window in windows)


def test_epochs_and_seeds_differ() -> None:
    orders = [epoch(number, 200, seed) for number in range(3) for seed in (0, 1, 2**63)]
    assert len({tuple(order) for order in orders}) == 9
    for i, first in enumerate(orders):
        for second in orders[:i]:
            # Two random permutations of n agree in one place on average.
            assert sum(a == b for a, b in zip(first, second, strict=True)) < 12


def test_neighbours_are_scattered() -> None:
    order = np.array(epoch(0, 100_000, seed=7))
    distances = np.abs(np.diff(order))
    # Mean distance of two random windows is n / 3, with a standard error of about n / 1,300 here.
    assert abs(distances.mean() / 100_000 - 1 / 3) < 0.005
    assert np.count_nonzero(distances == 1) < 20
    assert abs(np.corrcoef(order, np.arange(len(order)))[0, 1]) < 0.02


def test_small_domains_are_not_biased() -> None:
    """Over many epochs each of 5 windows comes first equally often: 2,000 of 10,000, deviation 40."""
    first = windows_at(np.arange(10_000) * 5, 5, seed=3)
    assert np.abs(np.bincount(first, minlength=5) - 2000).max() < 200


def test_the_order_is_frozen() -> None:
    """Runs in progress depend on these numbers."""
    assert epoch(0, 10, seed=1234) == [4, 2, 8, 0, 9, 5, 6, 7, 1, 3]
    assert windows_at(np.array([10**15]), 10**12, seed=1234).item() == 928_981_985_544
