"""Documents from files: JSONL, plain or compressed, Parquet, and text files of one document each.

Nothing is dropped silently: what cannot be used is a `BadLine` with its place and reason, and a file that
is damaged as a whole is a DataError. JSON is read strictly (orjson): NaN, lone surrogates and invalid UTF-8
are not JSON. Only \\n ends a line, so CRLF, U+2028 and a missing last newline change nothing; a byte order
mark at the start of a file and blank lines are passed over.
"""

import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import orjson

from llama_mcore.data.compressed import open_gzip, open_zstd
from llama_mcore.data.inputs import InputFile, Source, find_inputs, sources_of, text_files_of
from llama_mcore.errors import DataError, MissingInputError, Problem

LONGEST_DOCUMENT = 2**31 - 1
"""Bytes of one line, or of one text file."""
BLOCK_BYTES = 1 << 20
_BOM = b"\xef\xbb\xbf"
_START = 40
_EXPECTED = 'give JSONL: one object a line, such as {"text": "..."}'
_WHOLE = 1 << 62


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

    def read(self, cut: int) -> Iterator[Block]:
        """The documents of one unit."""

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Record:
    """One document as its file holds it."""

    path: Path
    line: int
    """Counted from 1."""
    size: int
    """Bytes of the file that the document took."""
    fields: dict[str, Any]

    def text(self, key: str) -> str:
        """The text under `key`; DataError if there is none or it is something else."""
        if reason := why_not_text(self.fields, key):
            raise bad_line_error(BadLine(self.path, None, reason, ""), self.line)
        return str(self.fields[key])


def check_inputs(paths: Sequence[Path]) -> int:
    """Bytes in all input files. MissingInputError names every one that is not a readable file."""
    return sum(file.size for file in find_inputs(paths))


def read_records(paths: Sequence[Path], key: str = "text") -> Iterator[Record]:
    """The documents of all files, in order; a text file's is under `key`. DataError at a bad one."""
    for source in sources_of(find_inputs(paths), _WHOLE):
        if source.format == "text":
            yield from _text_records(source, key)
        elif source.format == "parquet":
            yield from _parquet_records(source)
        else:
            yield from read_jsonl(source.path, open_stream(source))


def read_jsonl(path: Path, stream: BinaryIO | None = None) -> Iterator[Record]:
    """One JSON object a line; blank lines do not count as documents."""
    lines = Lines(lambda: stream or _open_plain(path), _WHOLE)
    number = 0
    for batch in lines.read(0):
        for line in batch:
            number += 1
            if not line.isspace() and line:
                if reason := why_not_object(line):
                    raise bad_line_error(BadLine(path, None, reason, ""), number)
                yield Record(path, number, len(line), orjson.loads(line))


class TooLong(bytes):
    """The start of a line longer than LONGEST_DOCUMENT."""


class Lines:
    """Lines of a stream of bytes, by units."""

    def __init__(self, open_stream: Callable[[], BinaryIO], unit_bytes: int) -> None:
        self._open_stream, self._unit_bytes = open_stream, unit_bytes
        self._stream: BinaryIO | None = None
        self._position = 0
        self._next = 0
        self.ended = False

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
        while self._position < end and not self.ended:
            yield self._some_lines(end)

    def close(self) -> None:
        if self._stream:
            self._stream.close()
        self._stream, self._position, self.ended = None, 0, False

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
            if len(line) > LONGEST_DOCUMENT and not line.endswith(b"\n"):
                line = TooLong(line[:_START])
                self._drop_line()
            lines.append(line.removeprefix(_BOM) if at_start else line)
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


class JsonLines:
    """Documents of JSON lines."""

    def __init__(self, path: Path, lines: Lines, keys: Sequence[str]) -> None:
        self._path, self._lines, self._keys = path, lines, keys
        # A key that occurs once in the bytes of a line cannot be there twice.
        self._quoted = [orjson.dumps(key) for key in keys]

    @property
    def ended(self) -> bool:
        return self._lines.ended

    def read(self, cut: int) -> Iterator[Block]:
        first = 0
        lines = self._lines.read(cut)
        # No name keeps the lines of a block alive while its texts are encoded.
        while (block := self._parse(next(lines, None), first)) is not None:
            first += block.lines
            yield block

    def close(self) -> None:
        self._lines.close()

    def _parse(self, lines: list[bytes] | None, first: int) -> Block | None:
        if lines is None:
            return None
        block = Block([[] for _ in self._keys], lines=len(lines), size=sum(map(len, lines)))
        for number, line in enumerate(lines, first):
            try:
                fields = orjson.loads(line)
                found = [fields[key] for key in self._keys]
                usable = all(type(text) is str for text in found) and not self._may_repeat(line)
            except (orjson.JSONDecodeError, KeyError, TypeError):
                usable = False
            if usable or (line and not line.isspace() and not (reason := self._why_not(line))):
                for texts, text in zip(block.texts, found, strict=True):
                    texts.append(text)
            elif line and not line.isspace():
                start = line[:_START].decode("utf-8", errors="replace").strip()
                block.bad.append(BadLine(self._path, number, reason, start))
        return block

    def _may_repeat(self, line: bytes) -> bool:
        return any(line.count(quoted) > 1 for quoted in self._quoted)

    def _why_not(self, line: bytes) -> str:
        if reason := why_not_object(line):
            return reason
        fields = orjson.loads(line)
        reasons = [reason for key in self._keys if (reason := why_not_text(fields, key))]
        return reasons[0] if reasons else _why_repeated(line, self._keys)


class TextFiles:
    """Text files of one document each, to which every key leads."""

    def __init__(self, source: Source, unit_bytes: int, num_keys: int) -> None:
        self._source, self._unit_bytes, self._num_keys = source, unit_bytes, num_keys
        self.ended = False

    def read(self, cut: int) -> Iterator[Block]:
        for file in text_files_of(self._source, cut, self._unit_bytes):
            block = Block([[] for _ in range(self._num_keys)], lines=1, size=file.size)
            text, reason = _read_text(file)
            if reason:
                block.bad.append(BadLine(file.path, None, reason, text))
            else:
                for texts in block.texts:
                    texts.append(text)
            yield block
        self.ended = self._source.units is not None and cut >= self._source.units - 1

    def close(self) -> None:
        pass


def make_reader(source: Source, keys: Sequence[str], unit_bytes: int) -> Reader:
    """The reader of a source that is no stream."""
    if source.format == "parquet":
        from llama_mcore.data.parquet import ParquetRows  # pyarrow takes long to import

        return ParquetRows(source.path, keys, unit_bytes)
    if source.format == "text":
        return TextFiles(source, unit_bytes, len(keys))
    return JsonLines(source.path, Lines(lambda: open_stream(source), unit_bytes), keys)


def payload_reader(path: Path, payload: bytes, keys: Sequence[str]) -> Reader:
    """The reader of lines of a stream that another process has read: its unit is 0."""
    return JsonLines(path, Lines(lambda: io.BytesIO(payload), _WHOLE), keys)


def open_stream(source: Source) -> BinaryIO:
    """The bytes of a file of lines, decompressed."""
    if source.format == "gzip":
        return open_gzip(source.path)
    if source.format == "zstd":
        return open_zstd(source.path)
    return _open_plain(source.path)


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


def bad_line_error(bad: BadLine, number: int | None) -> DataError:
    """The error for a line, with its number in the file, counted from 1."""
    place = "row" if bad.path.suffix == ".parquet" else "line"
    where = str(bad.path) if number is None else f"{bad.path} {place} {number}"
    return DataError(Problem("input", where, bad.reason))


def why_not_object(line: bytes) -> str | None:
    """Why a line is no JSON object; None if it is one."""
    try:
        value = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        if isinstance(line, TooLong):
            return f"is longer than {LONGEST_DOCUMENT:,} bytes"
        start = line[:_START].decode("utf-8", errors="replace").strip()
        return f"is not JSON ({error}); it starts {start!r}; {_EXPECTED}"
    if not isinstance(value, dict):
        return f"holds a JSON {type(value).__name__}, not an object; {_EXPECTED}"
    return None


def why_not_text(fields: dict[str, Any], key: str) -> str | None:
    """Why there is no text under `key`; None if there is."""
    if key not in fields:
        return f"has no key {key!r}; keys there: {', '.join(fields) or 'none'}"
    if not isinstance(fields[key], str):
        return f"holds {type(fields[key]).__name__} under {key!r}, not a string; name a key that holds text"
    return None


def _why_repeated(line: bytes, keys: Sequence[str]) -> str:
    """Empty if no key is there twice. A tuple stands for an object, so that only objects are looked at."""
    try:
        names = [name for name, _ in json.loads(line, object_pairs_hook=tuple)]
    except RecursionError:
        return "is nested too deeply"
    repeated = [key for key in keys if names.count(key) > 1]
    return f"has key {repeated[0]!r} more than once" if repeated else ""


def _open_plain(path: Path) -> BinaryIO:
    try:
        return path.open("rb", buffering=BLOCK_BYTES)
    except OSError as error:
        raise MissingInputError(Problem("input", path, f"cannot be read ({error.strerror})")) from error


def _read_text(file: InputFile) -> tuple[str, str]:
    """The text, or its start and why it cannot be used."""
    if file.size > LONGEST_DOCUMENT:
        return "", f"is longer than {LONGEST_DOCUMENT:,} bytes"
    with _open_plain(file.path) as stream:
        content = stream.read().removeprefix(_BOM)
    try:
        return content.decode("utf-8"), ""
    except UnicodeDecodeError as error:
        start = content[:_START].decode("utf-8", errors="replace")
        return start, f"is not UTF-8 (byte {error.start:,}: {error.reason})"


def _text_records(source: Source, key: str) -> Iterator[Record]:
    for file in source.files:
        text, reason = _read_text(file)
        if reason:
            raise bad_line_error(BadLine(file.path, None, reason, ""), None)
        yield Record(file.path, 1, file.size, {key: text})


def _parquet_records(source: Source) -> Iterator[Record]:
    from llama_mcore.data.parquet import parquet_rows

    for number, (size, fields) in enumerate(parquet_rows(source.path), start=1):
        yield Record(source.path, number, size, fields)
