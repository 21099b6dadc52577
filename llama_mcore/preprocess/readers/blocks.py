"""What readers give: documents some at a time, and what cannot be used with its place and reason."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from llama_mcore.errors import DataError, Problem

LONGEST_DOCUMENT = 256 << 20
"""Bytes of one line, one row of Parquet or one text file. To read one takes three times as much memory."""
BLOCK_BYTES = 4 << 20
BOM = b"\xef\xbb\xbf"
START = 40
"""Bytes of a bad line that are shown."""


@dataclass(frozen=True)
class BadLine:
    """What cannot be used. `line` counts from 0 in its unit for lines, in its file for rows of Parquet."""

    path: Path
    line: int | None
    reason: str
    start: str


@dataclass
class Block:
    """Some documents, in order: of each key the texts. About BLOCK_BYTES, and at least one document."""

    texts: list[list[str]]
    bad: list[BadLine] = field(default_factory=list)
    lines: int = 0
    """Lines or rows that were read, blank ones too."""
    size: int = 0
    """Bytes of text that were read, in the notation of the file."""


class Reader(Protocol):
    """Reads one source. It is cheap to read units in rising order."""

    @property
    def ended(self) -> bool:
        """The last unit that was read reached the end of the source."""

    @property
    def taken(self) -> int:
        """Bytes of the file, as it is on disk, that the last unit took."""

    def read(self, cut: int) -> Iterator[Block]:
        """The documents of one unit."""

    def close(self) -> None: ...


def bad_line_error(bad: BadLine, number: int | None) -> DataError:
    """The error for a line, with its number in the file, counted from 1."""
    place = "row" if bad.path.suffix == ".parquet" else "line"
    where = str(bad.path) if number is None else f"{bad.path} {place} {number}"
    return DataError(Problem("--input", where, bad.reason))
