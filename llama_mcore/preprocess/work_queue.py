"""Which unit is next, and in which order units are joined: the order of the input, whoever did them."""

import sys
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

from llama_mcore.preprocess.inputs import STDIN, Source, Unit
from llama_mcore.preprocess.part_store import PartRecord
from llama_mcore.preprocess.readers.blocks import LONGEST_DOCUMENT


@dataclass(frozen=True)
class Shard:
    """One of `count` parts of equal size of the whole input, for jobs on several machines."""

    index: int = 0
    count: int = 1

    def cuts_of(self, source: Source, total_bytes: int, unit_bytes: int) -> range | None:
        """The units of a source that belong to it; None for all of a source whose end is not known.

        A unit belongs to the shard in which its first byte lies, and so does a source of unknown length: so
        the shards one after the other are the whole.
        """
        start = total_bytes * self.index // self.count - source.position
        end = total_bytes * (self.index + 1) // self.count - source.position
        if self.index == self.count - 1:
            end = max(end, source.size) + 1
        if source.units is None:
            return None if start <= 0 < end else range(0)
        first, stop = (min(max(-(-byte // unit_bytes), 0), source.units) for byte in (start, end))
        return range(first, stop)


WHOLE = Shard()


class Schedule:
    """Hands out the units that are not done. `done`: (source, cut) -> record, of those that are."""

    def __init__(
        self,
        sources: Sequence[Source],
        unit_bytes: int,
        shard: Shard,
        done: dict[tuple[int, int], PartRecord],
    ) -> None:
        total = sum(source.size for source in sources)
        self.done = done
        self._cuts = [shard.cuts_of(source, total, unit_bytes) for source in sources]
        self._next = [0 if cuts is None else cuts.start for cuts in self._cuts]
        self._ended = [cuts is not None and not cuts for cuts in self._cuts]
        self._untouched = deque(source.index for source in sources if not self._ended[source.index])
        self._begun: list[int] = []
        self._last: dict[int, int] = {}
        self._streams = {s.index: _stream_units(s, unit_bytes) for s in sources if s.format == "stream"}

    def next(self, worker: int) -> Unit | None:
        """For this worker: of the source that it reads already, else of a new one, else of any.

        A source of unknown length may give a unit that lies beyond its end: it will turn out to be empty.
        """
        while True:
            source = self._choose(worker)
            if source is None:
                return None
            unit = self._take(source)
            if unit:
                self._last[worker] = source
                return unit
            self._ended[source] = True

    def finished(self, unit: Unit, record: PartRecord) -> None:
        self.done[unit.source, unit.cut] = record
        if record.ended and self._cuts[unit.source] is None and unit.source not in self._streams:
            self._ended[unit.source] = True

    def in_order(self) -> Iterator[tuple[Unit, PartRecord]]:
        """All units that are done, in the order of the input."""
        for source, cuts in enumerate(self._cuts):
            if cuts is not None:
                yield from ((Unit(source, cut), self.done[source, cut]) for cut in cuts)
                continue
            cut = 0
            while record := self.done.get((source, cut)):
                yield Unit(source, cut), record
                if record.ended and source not in self._streams:
                    break
                cut += 1

    def _choose(self, worker: int) -> int | None:
        last = self._last.get(worker)
        if last is not None and not self._ended[last]:
            return last
        if self._untouched:
            self._begun.append(self._untouched.popleft())
            return self._begun[-1]
        self._begun = [source for source in self._begun if not self._ended[source]]
        return self._begun[worker % len(self._begun)] if self._begun else None

    def _take(self, source: int) -> Unit | None:
        if source in self._streams:
            return next(self._streams[source], None)
        cuts = self._cuts[source]
        while record := self.done.get((source, self._next[source])):
            if record.ended and cuts is None:
                return None
            self._next[source] += 1
        cut = self._next[source]
        if cuts is not None and cut >= cuts.stop:
            return None
        self._next[source] += 1
        return Unit(source, cut)


def _stream_units(source: Source, unit_bytes: int) -> Iterator[Unit]:
    """The same units as of a file."""
    cut = position = lines = 0
    standard = str(source.path) == STDIN
    with nullcontext(sys.stdin.buffer) if standard else source.path.open("rb") as stream:
        while True:
            wanted = (cut + 1) * unit_bytes - position  # nothing after a line that is longer than a unit
            payload = stream.read(max(0, wanted))
            if wanted > 0 and not payload:
                return
            if payload and not payload.endswith(b"\n"):
                payload += stream.readline(LONGEST_DOCUMENT)
            yield Unit(source.index, cut, payload, lines)
            cut, position, lines = cut + 1, position + len(payload), lines + payload.count(b"\n")
