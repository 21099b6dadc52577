"""Readers of documents: from JSONL, plain or compressed, Parquet, and text files of one document each.

Nothing is dropped silently: a document that cannot be used is a `BadLine` with its place and reason, and a
file that is damaged as a whole is a DataError. Only \\n ends a line, so CRLF, U+2028 and a missing last
newline change nothing; a byte order mark at the start of a file and blank lines are skipped.
"""

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import orjson

from llama_mcore.preprocess.inputs import FileGroup, InputFile, find_inputs, group_files, text_files_of
from llama_mcore.preprocess.readers.interface import (
    BOM,
    LONGEST_DOCUMENT,
    START_BYTES,
    BadLine,
    Batch,
    Reader,
    bad_line_error,
)
from llama_mcore.preprocess.readers.jsonl import (
    JsonLines,
    Lines,
    open_lines,
    open_plain,
    why_not_object,
    why_not_text,
)

_ONE_UNIT = 1 << 62
"""Bytes of a unit that holds a whole file."""


@dataclass(frozen=True, slots=True)
class Record:
    """A document with its place in the input."""

    path: Path
    line: int
    """Counted from 1."""
    size: int
    """Bytes that it takes in the file, decompressed."""
    fields: dict[str, Any]

    def text(self, key: str) -> str:
        """The text under `key`; DataError if there is none."""
        if reason := why_not_text(self.fields, key):
            raise bad_line_error(BadLine(self.path, None, reason, ""), self.line)
        return str(self.fields[key])


def read_records(paths: Sequence[Path], key: str = "text") -> Iterator[Record]:
    """The documents of all files, in order; a text file's text is under `key`. DataError at a bad one."""
    for group in group_files(find_inputs(paths), _ONE_UNIT):
        if group.format == "text":
            yield from _text_records(group, key)
        elif group.format == "parquet":
            yield from _parquet_records(group, key)
        else:
            yield from read_jsonl(group.path, open_lines(group))


def read_jsonl(path: Path, stream: BinaryIO | None = None) -> Iterator[Record]:
    """The documents of a file with one JSON object a line; blank lines are skipped."""
    lines = Lines(lambda: stream or open_plain(path), _ONE_UNIT)
    number = 0
    for batch in lines.read(0):
        for line in batch:
            number += 1
            if not line.isspace() and line:
                if reason := why_not_object(line):
                    raise bad_line_error(BadLine(path, None, reason, ""), number)
                yield Record(path, number, len(line), orjson.loads(line))


class TextFiles:
    """Reader of text files of one document each, which is the text of every key."""

    def __init__(self, group: FileGroup, unit_bytes: int, num_keys: int) -> None:
        self._group, self._unit_bytes, self._num_keys = group, unit_bytes, num_keys
        self.ended = False
        self.bytes_read = 0

    def read(self, index: int) -> Iterator[Batch]:
        self.bytes_read = 0
        for file in text_files_of(self._group, index, self._unit_bytes):
            self.bytes_read += file.size
            batch = Batch([[] for _ in range(self._num_keys)], lines=1)
            text, reason = _read_text(file)
            if reason:
                batch.bad.append(BadLine(file.path, None, reason, text))
            else:
                for texts in batch.texts:
                    texts.append(text)
            yield batch
        self.ended = self._group.num_units is not None and index >= self._group.num_units - 1

    def close(self) -> None:
        pass


def make_reader(group: FileGroup, keys: Sequence[str], unit_bytes: int) -> Reader:
    """The reader of a group of any format but a stream."""
    if group.format == "parquet":
        from llama_mcore.preprocess.readers.parquet import ParquetRows  # pyarrow takes long to import

        return ParquetRows(group.path, keys, unit_bytes)
    if group.format == "text":
        return TextFiles(group, unit_bytes, len(keys))
    return JsonLines(group.path, Lines(lambda: open_lines(group), unit_bytes), keys)


def payload_reader(path: Path, payload: bytes, keys: Sequence[str]) -> Reader:
    """The reader of lines that another process has read from a stream, as its unit 0."""
    return JsonLines(path, Lines(lambda: io.BytesIO(payload), _ONE_UNIT), keys)


def _read_text(file: InputFile) -> tuple[str, str]:
    """The text and no reason, or its start and the reason why it cannot be used."""
    if file.size > LONGEST_DOCUMENT:
        return "", f"is longer than {LONGEST_DOCUMENT:,} bytes"
    with open_plain(file.path) as stream:
        content = stream.read().removeprefix(BOM)
    try:
        return content.decode("utf-8"), ""
    except UnicodeDecodeError as error:
        start = content[:START_BYTES].decode("utf-8", errors="replace")
        return start, f"is not UTF-8 (byte {error.start:,}: {error.reason})"


def _text_records(group: FileGroup, key: str) -> Iterator[Record]:
    for file in group.files:
        text, reason = _read_text(file)
        if reason:
            raise bad_line_error(BadLine(file.path, None, reason, ""), None)
        yield Record(file.path, 1, file.size, {key: text})


def _parquet_records(group: FileGroup, key: str) -> Iterator[Record]:
    from llama_mcore.preprocess.readers.parquet import ParquetRows

    rows, number = ParquetRows(group.path, [key], _ONE_UNIT), 0
    for batch in rows.read(0):
        for bad in batch.bad[:1]:
            raise bad_line_error(bad, (bad.line or 0) + 1)
        for text in batch.texts[0]:
            number += 1
            yield Record(group.path, number, rows.size_of_row, {key: text})
