"""Lines of plain and compressed files, by units: those that begin in a stretch of bytes."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from llama_mcore.errors import MissingInputError, input_problem
from llama_mcore.preprocess.inputs import Source
from llama_mcore.preprocess.readers.blocks import BLOCK_BYTES, BOM, LONGEST_DOCUMENT, START
from llama_mcore.preprocess.readers.compressed import Decompressed, open_gzip, open_zstd


class TooLong(bytes):
    """The start of a line longer than LONGEST_DOCUMENT."""


class Lines:
    """Lines of a stream of bytes, by units."""

    def __init__(self, open_stream: Callable[[], BinaryIO], unit_bytes: int) -> None:
        self._open_stream, self._unit_bytes = open_stream, unit_bytes
        self._stream: BinaryIO | None = None
        self._position = 0
        self._next = 0
        self._taken_before = 0
        self.ended = False

    @property
    def taken(self) -> int:
        """Bytes on disk since the start of the unit."""
        return self._on_disk() - self._taken_before

    def read(self, cut: int) -> Iterator[list[bytes]]:
        """The lines that begin in the unit, each with its end, about BLOCK_BYTES at a time.

        Of a line longer than LONGEST_DOCUMENT only the start comes, as TooLong.
        """
        start, end = cut * self._unit_bytes, (cut + 1) * self._unit_bytes
        if self._stream is None or cut < self._next:
            self.close()
            self._stream = self._open_stream()
        # What was read before ended at the start of a line: no other starts between there and `start`.
        if self._position < start:
            self._skip_to(start - 1)
            self._drop_line()
        self._next = cut + 1
        self._taken_before = self._on_disk()
        while self._position < end and not self.ended:
            yield self._some_lines(end)

    def close(self) -> None:
        if self._stream:
            self._stream.close()
        self._stream, self._position, self.ended = None, 0, False

    def _on_disk(self) -> int:
        raw = getattr(self._stream, "raw", None)
        return raw.position_on_disk if isinstance(raw, Decompressed) else self._position

    def _some_lines(self, end: int) -> list[bytes]:
        assert self._stream is not None
        lines, size, readline = [], 0, self._stream.readline
        while size < BLOCK_BYTES and self._position < end:
            line = readline(LONGEST_DOCUMENT + 1)
            if not line:
                self.ended = True
                break
            at_start = self._position == 0
            self._position += len(line)
            size += len(line)
            too_long = len(line) > LONGEST_DOCUMENT and not line.endswith(b"\n")
            if at_start:
                line = line.removeprefix(BOM)
            if too_long:
                line = TooLong(line[:START])
                self._drop_line()
            lines.append(line)
        return lines

    def _skip_to(self, position: int) -> None:
        assert self._stream is not None
        if self._stream.seekable():
            self._position = self._stream.seek(position)
            return
        while self._position < position:
            skipped = len(self._stream.read(min(position - self._position, BLOCK_BYTES)))
            if not skipped:
                break
            self._position += skipped

    def _drop_line(self) -> None:
        assert self._stream is not None
        while line := self._stream.readline(BLOCK_BYTES):
            self._position += len(line)
            if line.endswith(b"\n"):
                return
        self.ended = True


def open_stream(source: Source) -> BinaryIO:
    """The bytes of a file of lines, decompressed."""
    if source.format == "gzip":
        return open_gzip(source.path)
    if source.format == "zstd":
        return open_zstd(source.path)
    return open_plain(source.path)


def lines_before(source: Source, position: int) -> int:
    """How many lines begin before this byte of the text: where a unit's own count of lines starts."""
    if not position:
        return 0
    number, left = 1, position - 1
    with open_stream(source) as stream:
        while left and (chunk := stream.read(min(left, BLOCK_BYTES))):
            number += chunk.count(b"\n")
            left -= len(chunk)
    return number


def open_plain(path: Path) -> BinaryIO:
    try:
        return path.open("rb", buffering=BLOCK_BYTES)
    except OSError as error:
        raise MissingInputError(input_problem("--input", path, error=error)) from error
