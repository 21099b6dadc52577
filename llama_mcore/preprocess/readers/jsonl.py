"""JSON lines, read strictly: NaN, lone surrogates and invalid UTF-8 are not JSON.

`Lines` divides the bytes of a plain or compressed file into units, `JsonLines` takes the documents out of
them.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import orjson

from llama_mcore.errors import MissingInputError, input_problem
from llama_mcore.preprocess.inputs import FileGroup
from llama_mcore.preprocess.readers.compressed import Decompressed, open_gzip, open_zstd
from llama_mcore.preprocess.readers.interface import (
    BATCH_BYTES,
    BOM,
    LONGEST_DOCUMENT,
    START_BYTES,
    BadLine,
    Batch,
)

_EXPECTED = 'give JSONL: one object a line, such as {"text": "..."}'


class JsonLines:
    """Reader of JSON lines."""

    def __init__(self, path: Path, lines: "Lines", keys: Sequence[str]) -> None:
        self._path, self._lines, self._keys = path, lines, keys
        self._quoted = [orjson.dumps(key) for key in keys]

    @property
    def ended(self) -> bool:
        return self._lines.ended

    @property
    def bytes_read(self) -> int:
        return self._lines.bytes_read

    def read(self, index: int) -> Iterator[Batch]:
        first = 0
        lines = self._lines.read(index)
        # No name keeps the lines of a batch alive while its texts are encoded.
        while (batch := self._parse(next(lines, None), first)) is not None:
            first += batch.lines
            yield batch

    def close(self) -> None:
        self._lines.close()

    def _parse(self, lines: list[bytes] | None, first: int) -> Batch | None:
        if lines is None:
            return None
        batch = Batch([[] for _ in self._keys], lines=len(lines))
        for number, line in enumerate(lines, first):
            try:
                fields = orjson.loads(line)
                found = [fields[key] for key in self._keys]
                usable = all(type(text) is str for text in found) and not self._may_repeat_a_key(line)
            except (orjson.JSONDecodeError, KeyError, TypeError):
                usable = False
            if usable or (line and not line.isspace() and not (reason := self._why_not(line))):
                for texts, text in zip(batch.texts, found, strict=True):
                    texts.append(text)
            elif line and not line.isspace():
                start = line[:START_BYTES].decode("utf-8", errors="replace").strip()
                batch.bad.append(BadLine(self._path, number, reason, start))
        return batch

    def _may_repeat_a_key(self, line: bytes) -> bool:
        # A key that occurs once in the bytes of a line cannot be there twice.
        return any(line.count(quoted) > 1 for quoted in self._quoted)

    def _why_not(self, line: bytes) -> str:
        """The reason why a line cannot be used; empty if it can."""
        if reason := why_not_object(line):
            return reason
        fields = orjson.loads(line)
        reasons = [reason for key in self._keys if (reason := why_not_text(fields, key))]
        return reasons[0] if reasons else _why_repeated(line, self._keys)


def why_not_object(line: bytes) -> str | None:
    """The reason why a line is not a JSON object; None if it is one."""
    try:
        value = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        if isinstance(line, TooLong):
            return f"is longer than {LONGEST_DOCUMENT:,} bytes"
        start = line[:START_BYTES].decode("utf-8", errors="replace").strip()
        return f"is not JSON ({error}); it starts {start!r}; {_EXPECTED}"
    if not isinstance(value, dict):
        return f"holds a JSON {type(value).__name__}, not an object; {_EXPECTED}"
    return None


def why_not_text(fields: dict[str, Any], key: str) -> str | None:
    """The reason why there is no text under `key`; None if there is."""
    if key not in fields:
        return f"has no key {key!r}; its keys: {', '.join(fields) or 'none'}"
    if not isinstance(fields[key], str):
        return f"holds {type(fields[key]).__name__} under {key!r}, not a string; name a key that holds text"
    return None


def _why_repeated(line: bytes, keys: Sequence[str]) -> str:
    """The reason for a key that is there twice; empty if none is."""
    try:
        # An object comes as a tuple of its pairs, so that only the outer one is looked at.
        names = [name for name, _ in json.loads(line, object_pairs_hook=tuple)]
    except RecursionError:
        return "is nested too deeply"
    repeated = [key for key in keys if names.count(key) > 1]
    return f"has key {repeated[0]!r} more than once" if repeated else ""


class TooLong(bytes):
    """The start of a line longer than LONGEST_DOCUMENT."""


class Lines:
    """Lines of a stream of bytes, by the units in which they begin."""

    def __init__(self, open_stream: Callable[[], BinaryIO], unit_bytes: int) -> None:
        self._open_stream, self._unit_bytes = open_stream, unit_bytes
        self._stream: BinaryIO | None = None
        self._position = 0
        self._next = 0
        self._on_disk_before = 0
        self.ended = False

    @property
    def bytes_read(self) -> int:
        """Bytes on disk since the start of the unit."""
        return self._on_disk() - self._on_disk_before

    def read(self, index: int) -> Iterator[list[bytes]]:
        """The lines that begin in a unit, each with its end, about BATCH_BYTES at a time.

        A line longer than LONGEST_DOCUMENT comes as TooLong, which holds its start alone.
        """
        start, end = index * self._unit_bytes, (index + 1) * self._unit_bytes
        if self._stream is None or index < self._next:
            self.close()
            self._stream = self._open_stream()
        # The last unit read ended at the start of a line: no other line starts between there and `start`.
        if self._position < start:
            self._skip_to(start - 1)
            self._drop_line()
        self._next = index + 1
        self._on_disk_before = self._on_disk()
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
        while size < BATCH_BYTES and self._position < end:
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
                line = TooLong(line[:START_BYTES])
                self._drop_line()
            lines.append(line)
        return lines

    def _skip_to(self, position: int) -> None:
        assert self._stream is not None
        if self._stream.seekable():
            self._position = self._stream.seek(position)
            return
        while self._position < position:
            skipped = len(self._stream.read(min(position - self._position, BATCH_BYTES)))
            if not skipped:
                break
            self._position += skipped

    def _drop_line(self) -> None:
        assert self._stream is not None
        while line := self._stream.readline(BATCH_BYTES):
            self._position += len(line)
            if line.endswith(b"\n"):
                return
        self.ended = True


def open_lines(group: FileGroup) -> BinaryIO:
    """The bytes of a file of lines, decompressed."""
    if group.format == "gzip":
        return open_gzip(group.path)
    if group.format == "zstd":
        return open_zstd(group.path)
    return open_plain(group.path)


def open_plain(path: Path) -> BinaryIO:
    try:
        return path.open("rb", buffering=BATCH_BYTES)
    except OSError as error:
        raise MissingInputError(input_problem("--input", path, error=error)) from error


def lines_before(group: FileGroup, position: int) -> int:
    """Number of lines that begin before this byte of the decompressed text."""
    if not position:
        return 0
    number, left = 1, position - 1
    with open_lines(group) as stream:
        while left and (chunk := stream.read(min(left, BATCH_BYTES))):
            number += chunk.count(b"\n")
            left -= len(chunk)
    return number
