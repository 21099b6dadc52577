"""Ranks that are slower than the others, who then wait for them in every step.

What differs between ranks is the time that they do not spend waiting: to read their micro-batches and to run
them forward, in which a rank waits for none but those of its own tensor-parallel group (with ZeRO-3 for all,
who gather parameters). So a slow GPU may show as a slow group. The backward is left out: it reduces gradients
of all.
"""

import socket
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median

import torch
import torch.distributed as dist

from llama_mcore.distributed.device import Stopwatch
from llama_mcore.distributed.groups import Groups
from llama_mcore.observe.log import get_logger

SLOWER = 1.3
"""Relative to the median of all ranks."""


@dataclass(frozen=True)
class Straggler:
    rank: int
    host: str
    times_median: float
    """Its own time of a step over the median of all ranks'."""


class Stragglers:
    """Every method is called by all ranks together."""

    def __init__(self, window: int, groups: Groups) -> None:
        """`window`: steps between two looks; 0: none."""
        self._window, self._groups = window, groups
        self._steps: list[float] = []
        self._hosts: list[str] = []
        self.forward = Stopwatch()

    def add(self, reading_s: float) -> list[dict[str, object]]:
        """Note a step whose data took so long to read; at the end of a window return who was slow in it, for
        the report of the step."""
        seconds = reading_s + self.forward.take()
        if not self._window:
            return []
        self._steps.append(seconds)
        if len(self._steps) < self._window:
            return []
        own, self._steps = median(self._steps), []
        found = slow_ranks(self._of_all(own), self._hosts_of_all())
        if found:
            names = ", ".join(f"rank {s.rank} on {s.host} ({s.times_median:.1f} x)" for s in found)
            get_logger().warning("slower than the median of %d steps: %s", self._window, names)
        return [asdict(straggler) for straggler in found]

    def _of_all(self, own: float) -> list[float]:
        mine = torch.tensor([own], device=self._groups.device)
        every = torch.empty(self._groups.world_size, device=self._groups.device)
        dist.all_gather_into_tensor(every, mine)
        return every.tolist()

    def _hosts_of_all(self) -> list[str]:
        if not self._hosts:
            self._hosts = [""] * self._groups.world_size
            dist.all_gather_object(self._hosts, socket.gethostname())
        return self._hosts


def slow_ranks(seconds: Sequence[float], hosts: Sequence[str]) -> list[Straggler]:
    """Those whose `seconds` are more than `SLOWER` times the median, the slowest first."""
    usual = median(seconds)
    found = [
        Straggler(rank, host, round(own / usual, 2))
        for rank, (own, host) in enumerate(zip(seconds, hosts, strict=True))
        if own > SLOWER * usual
    ]
    return sorted(found, key=lambda straggler: -straggler.times_median)
