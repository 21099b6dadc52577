"""Documents from files: JSONL, plain or compressed, Parquet, and text files of one document each.

Nothing is dropped silently: what cannot be used is a `BadLine` with its place and reason, and a file that
is damaged as a whole is a DataError. Only \\n ends a line, so CRLF, U+2028 and a missing last newline change
nothing; a byte order mark at the start of a file and blank lines are passed over.
"""

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import orjson

from llama_mcore.preprocess.inputs import InputFile, Source, find_inputs, sources_of, text_files_of
from llama_mcore.preprocess.readers.blocks import (
    BOM,
    LONGEST_DOCUMENT,
    START,
    BadLine,
    Block,
    Reader,
    bad_line_error,
)
from llama_mcore.preprocess.readers.jsonl import JsonLines, why_not_object, why_not_text
from llama_mcore.preprocess.readers.lines import Lines, open_plain, open_stream

_WHOLE = 1 << 62


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


def read_records(paths: Sequence[Path], key: str = "text") -> Iterator[Record]:
    """The documents of all files, in order; a text file's is under `key`. DataError at a bad one."""
    for source in sources_of(find_inputs(paths), _WHOLE):
        if source.format == "text":
            yield from _text_records(source, key)
        elif source.format == "parquet":
            yield from _parquet_records(source, key)
        else:
            yield from read_jsonl(source.path, open_stream(source))


def read_jsonl(path: Path, stream: BinaryIO | None = None) -> Iterator[Record]:
    """One JSON object a line; blank lines do not count as documents."""
    lines = Lines(lambda: stream or open_plain(path), _WHOLE)
    number = 0
    for batch in lines.read(0):
        for line in batch:
            number += 1
            if not line.isspace() and line:
                if reason := why_not_object(line):
                    raise bad_line_error(BadLine(path, None, reason, ""), number)
                yield Record(path, number, len(line), orjson.loads(line))


class TextFiles:
    """Text files of one document each, to which every key leads."""

    def __init__(self, source: Source, unit_bytes: int, num_keys: int) -> None:
        self._source, self._unit_bytes, self._num_keys = source, unit_bytes, num_keys
        self.ended = False
        self.taken = 0

    def read(self, cut: int) -> Iterator[Block]:
        self.taken = 0
        for file in text_files_of(self._source, cut, self._unit_bytes):
            self.taken += file.size
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
        from llama_mcore.preprocess.readers.parquet import ParquetRows  # pyarrow takes long to import

        return ParquetRows(source.path, keys, unit_bytes)
    if source.format == "text":
        return TextFiles(source, unit_bytes, len(keys))
    return JsonLines(source.path, Lines(lambda: open_stream(source), unit_bytes), keys)


def payload_reader(path: Path, payload: bytes, keys: Sequence[str]) -> Reader:
    """The reader of lines of a stream that another process has read: its unit is 0."""
    return JsonLines(path, Lines(lambda: io.BytesIO(payload), _WHOLE), keys)


def _read_text(file: InputFile) -> tuple[str, str]:
    """The text, or its start and why it cannot be used."""
    if file.size > LONGEST_DOCUMENT:
        return "", f"is longer than {LONGEST_DOCUMENT:,} bytes"
    with open_plain(file.path) as stream:
        content = stream.read().removeprefix(BOM)
    try:
        return content.decode("utf-8"), ""
    except UnicodeDecodeError as error:
        start = content[:START].decode("utf-8", errors="replace")
        return start, f"is not UTF-8 (byte {error.start:,}: {error.reason})"


def _text_records(source: Source, key: str) -> Iterator[Record]:
    for file in source.files:
        text, reason = _read_text(file)
        if reason:
            raise bad_line_error(BadLine(file.path, None, reason, ""), None)
        yield Record(file.path, 1, file.size, {key: text})


def _parquet_records(source: Source, key: str) -> Iterator[Record]:
    from llama_mcore.preprocess.readers.parquet import ParquetRows

    rows, number = ParquetRows(source.path, [key], _WHOLE), 0
    for block in rows.read(0):
        for bad in block.bad[:1]:
            raise bad_line_error(bad, (bad.line or 0) + 1)
        for text in block.texts[0]:
            number += 1
            yield Record(source.path, number, rows.size_of_row, {key: text})
