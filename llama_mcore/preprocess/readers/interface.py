"""Interface of the readers: documents in batches, and the lines and rows that cannot be used."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from llama_mcore.errors import DataError, Problem

LONGEST_DOCUMENT = 256 << 20
"""Bytes of one line, one row of Parquet or one text file. Reading one takes three times as much memory."""
BATCH_BYTES = 4 << 20
BOM = b"\xef\xbb\xbf"
START_BYTES = 40
"""Bytes of a bad line that are shown."""


@dataclass(frozen=True)
class BadLine:
    """A document that cannot be used. `line` counts from 0, a line in its unit, a Parquet row in its file."""

    path: Path
    line: int | None
    reason: str
    start: str


@dataclass
class Batch:
    """Some documents in order, about BATCH_BYTES and at least one: the texts of each key."""

    texts: list[list[str]]
    bad: list[BadLine] = field(default_factory=list)
    lines: int = 0
    """Lines or rows read, blank lines included."""


class Reader(Protocol):
    """Reads one file group. Cheap for units in rising order: a compressed file is read forward only."""

    @property
    def ended(self) -> bool:
        """True if the last unit read reached the end of the group."""

    @property
    def bytes_read(self) -> int:
        """Bytes on disk that the last unit took."""

    def read(self, index: int) -> Iterator[Batch]:
        """The documents of one unit."""

    def close(self) -> None: ...


def bad_line_error(bad: BadLine, number: int | None, remedy: str = "fix it") -> DataError:
    """The error for a bad line, with its number in the file, counted from 1."""
    place = "row" if bad.path.suffix == ".parquet" else "line"
    where = str(bad.path) if number is None else f"{bad.path} {place} {number}"
    return DataError(Problem("--input", where, bad.reason, remedy))
