"""llama_mcore.train.stragglers: who is slow, on which host, and that only a whole window says so."""

import os
import sys
import time
from pathlib import Path

import pytest

from llama_mcore.train.stragglers import SLOWER, Straggler, slow_ranks
from tests.distributed import torchrun

HOSTS = ["node1", "node1", "node2", "node2"]


def test_the_slow_are_named_with_host_slowest_first() -> None:
    assert (
        slow_ranks([3.0, 2.0, 2.0, 8.0], HOSTS)
        == [Straggler(3, "node2", 3.2), Straggler(0, "node1", 1.2)][:1]
    )
    assert slow_ranks([2.0, 3.0, 8.0, 2.0, 2.0], [*HOSTS, "node3"]) == [
        Straggler(2, "node2", 4.0),
        Straggler(1, "node1", 1.5),
    ]


@pytest.mark.parametrize(("own", "slow"), [(SLOWER - 0.01, False), (SLOWER + 0.01, True)])
def test_the_bound(own: float, slow: bool) -> None:
    assert bool(slow_ranks([1.0, 1.0, own], ["a", "b", "c"])) is slow


def test_three_ranks_agree_who_was_slow() -> None:
    torchrun(3, Path(__file__))


def main() -> None:
    from llama_mcore.parallel.config import ParallelConfig
    from llama_mcore.parallel.groups import process_groups
    from llama_mcore.train.stragglers import Stragglers

    with process_groups(ParallelConfig(tp=1), 1) as groups:
        stragglers = Stragglers(3, groups)
        found = []
        for step in range(6):
            with stragglers.forward.running():
                time.sleep(0.3 if groups.rank == 1 else 0.0)
            # In the second window rank 2 is slow to read too; one slow step makes no slow window.
            reading = {1: 1.0, 2: 2.0 if step >= 3 else 60.0 * (step == 0)}.get(groups.rank, 1.0)
            found.append([slow["rank"] for slow in stragglers.add(reading)])
        assert found == [[], [], [], [], [], [2]] or sys.exit(f"rank {os.environ['RANK']}: {found}")


if __name__ == "__main__":
    main()
