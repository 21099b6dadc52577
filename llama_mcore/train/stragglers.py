"""Detection of stragglers: ranks that are slower than the others, who wait for them in every step.

Ranks differ in the time in which they do not wait: reading their micro-batches, and their forwards, in which
a rank waits only for its tensor-parallel group (with ZeRO-3 for all, who gather parameters). So a slow GPU
may show as a slow group. The backward is left out: it reduces gradients of all.
"""

import socket
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median

import torch
import torch.distributed as dist

from llama_mcore.distributed.collectives import gather_on_all_ranks
from llama_mcore.distributed.groups import Groups
from llama_mcore.observe.log import get_logger

SLOWER = 1.3
"""Least time of a straggler, relative to the median of all ranks."""


@dataclass(frozen=True)
class Straggler:
    rank: int
    host: str
    times_median: float
    """Time of a step on this rank over the median of all ranks."""


class Stragglers:
    """Comparison of the ranks' times over windows of steps.

    Collective: all ranks call every method.
    """

    def __init__(self, window: int, groups: Groups) -> None:
        """`window`: steps between two comparisons; 0: none."""
        self._window, self._groups = window, groups
        self._steps: list[float] = []
        self._hosts: list[str] = []

    def add(self, seconds: float) -> list[dict[str, object]]:
        """Add a step in which this rank worked for `seconds` without the others; at the end of a window
        returns the stragglers."""
        if not self._window:
            return []
        self._steps.append(seconds)
        if len(self._steps) < self._window:
            return []
        own, self._steps = median(self._steps), []
        if not self._hosts:
            self._hosts = gather_on_all_ranks(self._groups, socket.gethostname())
        stragglers = slow_ranks(self._gather(own), self._hosts)
        if stragglers:
            names = ", ".join(f"rank {s.rank} on {s.host} ({s.times_median:.1f} x)" for s in stragglers)
            get_logger().warning("slower than the median of %d steps: %s", self._window, names)
        return [asdict(straggler) for straggler in stragglers]

    def _gather(self, seconds: float) -> list[float]:
        # On the device, without the pickle of `gather_on_all_ranks`.
        mine = torch.tensor([seconds], device=self._groups.device)
        every = torch.empty(self._groups.world_size, device=self._groups.device)
        dist.all_gather_into_tensor(every, mine)
        return every.tolist()


def slow_ranks(seconds: Sequence[float], hosts: Sequence[str]) -> list[Straggler]:
    """Ranks whose `seconds` are more than `SLOWER` times the median, the slowest first."""
    usual = median(seconds)
    found = [
        Straggler(rank, host, round(own / usual, 2))
        for rank, (own, host) in enumerate(zip(seconds, hosts, strict=True))
        if own > SLOWER * usual
    ]
    return sorted(found, key=lambda straggler: -straggler.times_median)
