"""Mixture of sources: the source of the sample at a position, a pure function of (shares, position).

After any number k of samples each source has given floor(k * share) or ceil(k * share) of them, so the
mixture is within one sample of the plan at every prefix. Giving every slot to the source whose next sample is
due first, among those that may have one already, keeps to that (Steiner and Yeomans, "Level schedules for
mixed-model, just-in-time processes", 1993; such sequences are the quota method of Balinski and Young, 1975).

The rule needs all of the past, but soon forgets it: from any two states that can meet every later due date it
comes to the same state once the samples that were open in one of them are due, within 1/share slots. (Serving
a sample that the other has served already, the one catches up; what the other serves meanwhile is due before
something that is open there alone; so the latest due date among the differences never grows.) Such a state
is known for every slot: the quotas rounded down, and those that are due first up. So any position is reached
from there, over one block of slots that forgets and one that is read, and nothing is stored.

Runs depend on the sequence: a change here changes what a resumed run reads.
"""

import heapq
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from llama_mcore.errors import ConfigError, Problem

_BLOCK = 1024
_LONGEST_BLOCK = 2**17
SMALLEST_SHARE = 1 / _LONGEST_BLOCK


@dataclass(frozen=True)
class Mixture:
    """Sources in proportion to whole numbers `shares`, such as the windows that a run plans to read of each.

    Raises ConfigError for a share under 2^-17 of all: its samples would be too far apart to plan for.
    """

    shares: tuple[int, ...]

    def __post_init__(self) -> None:
        smallest = min(self.shares, default=0)
        if smallest * _LONGEST_BLOCK < sum(self.shares) or smallest < 1:
            raise ConfigError(
                Problem(
                    "data.sources",
                    f"{smallest:,} of {sum(self.shares):,} samples",
                    f"the smallest source must have at least 1 in {_LONGEST_BLOCK:,}",
                    "leave it out, or merge it with another source",
                )
            )

    def sources_at(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The source of each position, and the number of samples of that source before it."""
        sources, indices = np.zeros_like(positions), positions.copy()
        if len(self.shares) > 1:
            blocks, slots = np.divmod(positions, _block_length(self.shares))
            for block in np.unique(blocks):
                here = blocks == block
                block_sources, block_indices = _block(self.shares, int(block))
                sources[here] = block_sources[slots[here]]
                indices[here] = block_indices[slots[here]]
        return sources, indices

    def counts(self, position: int) -> list[int]:
        """Samples that each source gives to the first `position` samples."""
        if len(self.shares) == 1:
            return [position]
        block, slots = divmod(position, _block_length(self.shares))
        sources, _ = _block(self.shares, block)
        inside = np.bincount(sources[:slots], minlength=len(self.shares))
        return [before + int(here) for before, here in zip(_state(self.shares, block), inside, strict=True)]


def _block_length(shares: tuple[int, ...]) -> int:
    """Slots after which the rule has forgotten where it began."""
    return max(_BLOCK, -(-sum(shares) // min(shares)) + 1)


@lru_cache(maxsize=16)
def _block(shares: tuple[int, ...], block: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The source of each slot of a block, and the number of samples of that source before it."""
    before = _state(shares, block)
    sources = _fill(shares, block, before)
    indices = np.empty_like(sources)
    for source, given in enumerate(before):
        slots = np.flatnonzero(sources == source)
        indices[slots] = given + np.arange(len(slots))
    return sources, indices


@lru_cache(maxsize=64)
def _state(shares: tuple[int, ...], block: int) -> tuple[int, ...]:
    """Samples that each source has given before `block`."""
    if block == 0:
        return (0,) * len(shares)
    before = _first_due_rounded_up(shares, (block - 1) * _block_length(shares))
    inside = np.bincount(_fill(shares, block - 1, before), minlength=len(shares))
    return tuple(given + int(here) for given, here in zip(before, inside, strict=True))


def _first_due_rounded_up(shares: tuple[int, ...], position: int) -> tuple[int, ...]:
    total = sum(shares)
    counts = [position * share // total for share in shares]
    open_ones = [source for source, share in enumerate(shares) if position * share % total]
    open_ones.sort(key=lambda source: _due(counts[source], shares[source], total))
    for source in open_ones[: position - sum(counts)]:
        counts[source] += 1
    return tuple(counts)


def _fill(shares: tuple[int, ...], block: int, given: tuple[int, ...]) -> NDArray[np.int64]:
    """The source of each slot of a block; `given`: samples that each source has given before it."""
    total, length = sum(shares), _block_length(shares)
    counts = list(given)
    waiting = [(_allowed(counts[source], share, total), source) for source, share in enumerate(shares)]
    ready: list[tuple[int, int]] = []  # (due, source)
    heapq.heapify(waiting)
    filled = np.empty(length, dtype=np.int64)
    for slot in range(block * length, (block + 1) * length):
        while waiting and waiting[0][0] <= slot:
            _, source = heapq.heappop(waiting)
            heapq.heappush(ready, (_due(counts[source], shares[source], total), source))
        _, source = heapq.heappop(ready)
        filled[slot - block * length] = source
        counts[source] += 1
        heapq.heappush(waiting, (_allowed(counts[source], shares[source], total), source))
    return filled


def _allowed(index: int, share: int, total: int) -> int:
    """The first slot for a source's sample `index` that does not put it a sample ahead."""
    return index * total // share


def _due(index: int, share: int, total: int) -> int:
    """The last slot for a source's sample `index` that does not put it a sample behind."""
    return -(-(index + 1) * total // share) - 1
