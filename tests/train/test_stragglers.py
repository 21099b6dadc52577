"""llama_mcore.train.stragglers: who is slow, on which host, and that only a whole window says so."""

import time

import pytest

from llama_mcore.distributed.config import ParallelConfig
from llama_mcore.distributed.device import Stopwatch
from llama_mcore.distributed.groups import process_groups
from llama_mcore.train.stragglers import SLOWER, Straggler, Stragglers, slow_ranks
from tests.support.world import run_ranks

HOSTS = ["node1", "node1", "node2", "node2"]


def test_the_slow_are_named_with_host_slowest_first() -> None:
    assert slow_ranks([3.0, 2.0, 2.0, 8.0], HOSTS) == [Straggler(3, "node2", 3.2)]  # the median is 2.5
    assert slow_ranks([2.0, 3.0, 8.0, 2.0, 2.0], [*HOSTS, "node3"]) == [
        Straggler(2, "node2", 4.0),
        Straggler(1, "node1", 1.5),
    ]


@pytest.mark.parametrize(("own", "slow"), [(SLOWER - 0.01, False), (SLOWER + 0.01, True)])
def test_the_bound(own: float, slow: bool) -> None:
    assert bool(slow_ranks([1.0, 1.0, own], ["a", "b", "c"])) is slow


def test_a_stopwatch_adds_up() -> None:
    watch = Stopwatch()
    for _ in range(2):
        with watch.running():
            time.sleep(0.02)
    assert watch.seconds() >= 0.04


@pytest.mark.process
def test_three_ranks_agree_who_was_slow() -> None:
    assert run_ranks(3, slow_in_each_step) == [[[], [], [], [], [], [2]]] * 3


def slow_in_each_step() -> list[list[object]]:
    """A single slow step makes no slow window: rank 2 is slow once, then in all of the second three."""
    with process_groups(ParallelConfig(tp=1), 1) as groups:
        stragglers, found = Stragglers(3, groups), []
        for step in range(6):
            is_slow = groups.rank == 2 and step in (0, 3, 4, 5)
            found.append([late["rank"] for late in stragglers.add(60.0 if is_slow else 30.0)])
        return found
