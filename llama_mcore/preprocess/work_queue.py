"""Queue of the units that are still to do, and their order in the input once they are done."""

import sys
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

from llama_mcore.preprocess.inputs import STDIN, FileGroup, Unit
from llama_mcore.preprocess.part_store import PartRecord
from llama_mcore.preprocess.readers.interface import LONGEST_DOCUMENT


@dataclass(frozen=True)
class Shard:
    """The share of the input that one of `count` jobs does, all of them of equal size."""

    index: int = 0
    count: int = 1

    def units_of(self, group: FileGroup, total_bytes: int, unit_bytes: int) -> range | None:
        """Indices of the units of a group in this shard; None for all units of a group of unknown length.

        The shard in which the first byte of a unit lies has that unit, and likewise a group of unknown
        length, so that the shards one after the other are the whole input.
        """
        start = total_bytes * self.index // self.count - group.position
        end = total_bytes * (self.index + 1) // self.count - group.position
        if self.index == self.count - 1:
            end = max(end, group.size) + 1
        if group.num_units is None:
            return None if start <= 0 < end else range(0)
        first, stop = (min(max(-(-byte // unit_bytes), 0), group.num_units) for byte in (start, end))
        return range(first, stop)


class WorkQueue:
    """Units that are not done yet. `done`: the records of those that are, by (group, index)."""

    def __init__(
        self,
        groups: Sequence[FileGroup],
        unit_bytes: int,
        shard: Shard,
        done: dict[tuple[int, int], PartRecord],
    ) -> None:
        total = sum(group.size for group in groups)
        self.done = done
        self._units = [shard.units_of(group, total, unit_bytes) for group in groups]
        self._next = [0 if units is None else units.start for units in self._units]
        self._ended = [units is not None and not units for units in self._units]
        self._untouched = deque(group.index for group in groups if not self._ended[group.index])
        self._begun: list[int] = []
        self._last: dict[int, int] = {}
        self._streams = {g.index: _stream_units(g, unit_bytes) for g in groups if g.format == "stream"}

    def next_unit(self, worker: int) -> Unit | None:
        """The next unit for a worker: of the group that it reads already, else of a new one, else of any.

        A unit of a group of unknown length may lie beyond its end: it will turn out to be empty.
        """
        while True:
            group = self._choose_group(worker)
            if group is None:
                return None
            if unit := self._take(group):
                self._last[worker] = group
                return unit
            self._ended[group] = True

    def finish(self, unit: Unit, record: PartRecord) -> None:
        self.done[unit.group, unit.index] = record
        if record.ended and self._units[unit.group] is None and unit.group not in self._streams:
            self._ended[unit.group] = True

    def in_order(self) -> Iterator[tuple[Unit, PartRecord]]:
        """All units that are done, in the order of the input."""
        for group, units in enumerate(self._units):
            if units is not None:
                yield from ((Unit(group, index), self.done[group, index]) for index in units)
                continue
            index = 0
            while record := self.done.get((group, index)):
                yield Unit(group, index), record
                if record.ended and group not in self._streams:
                    break
                index += 1

    def _choose_group(self, worker: int) -> int | None:
        last = self._last.get(worker)
        if last is not None and not self._ended[last]:
            return last
        if self._untouched:
            self._begun.append(self._untouched.popleft())
            return self._begun[-1]
        self._begun = [group for group in self._begun if not self._ended[group]]
        return self._begun[worker % len(self._begun)] if self._begun else None

    def _take(self, group: int) -> Unit | None:
        if group in self._streams:
            return next(self._streams[group], None)
        units = self._units[group]
        while record := self.done.get((group, self._next[group])):
            if record.ended and units is None:
                return None
            self._next[group] += 1
        index = self._next[group]
        if units is not None and index >= units.stop:
            return None
        self._next[group] += 1
        return Unit(group, index)


def _stream_units(group: FileGroup, unit_bytes: int) -> Iterator[Unit]:
    """The units of a stream with their lines: the same units as of a file with that content."""
    index = position = lines = 0
    is_stdin = str(group.path) == STDIN
    with nullcontext(sys.stdin.buffer) if is_stdin else group.path.open("rb") as stream:
        while True:
            # Nothing is left to read for a unit that lies inside a line longer than a unit.
            wanted = (index + 1) * unit_bytes - position
            payload = stream.read(max(0, wanted))
            if wanted > 0 and not payload:
                return
            if payload and not payload.endswith(b"\n"):
                payload += stream.readline(LONGEST_DOCUMENT)
            yield Unit(group.index, index, payload, lines)
            index, position, lines = index + 1, position + len(payload), lines + payload.count(b"\n")
