"""Documents from the rows of Parquet files, a few row pages in memory at a time."""

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import pyarrow as pa
from pyarrow import compute, parquet

from llama_mcore.errors import DataError, Problem
from llama_mcore.preprocess.readers.blocks import BLOCK_BYTES, LONGEST_DOCUMENT, BadLine, Block

_READ_BUFFER = 1 << 20
_MOST_ROWS = 8192
_LARGEST_UNASKED, _MOST_COMPRESSED = 64 << 20, 200
"""Bytes of a column of a row group, and how many may be one byte on disk: of text it is 2 to 20."""
_DICTIONARY_PAGE = re.compile(rb"\x15\x04\x15([\x80-\xff]{0,4}[\0-\x7f])", re.DOTALL)
"""Begins its header, in Thrift's compact notation: fields 1 and 2, a type and a size."""

Answer = TypeVar("Answer")


class ParquetRows:
    """Rows by units: as many rows a unit as hold about `unit_bytes` of the file's uncompressed data."""

    def __init__(self, path: Path, keys: Sequence[str], unit_bytes: int) -> None:
        self._path, self._keys = path, list(keys)
        self._file = _open(path)
        self._check_columns()
        metadata = self._file.metadata
        _check_sizes(path, metadata, self._keys)
        largest_word = _largest_dictionary(path, metadata, self._keys)
        self._starts = [0]
        for group in range(metadata.num_row_groups):
            self._starts.append(self._starts[-1] + metadata.row_group(group).num_rows)
        self._num_rows = self._starts[-1]
        self.size_of_row = path.stat().st_size // max(1, self._num_rows)
        """Bytes of the file."""
        self._bytes_per_row = max(1, _uncompressed_bytes(metadata, self._keys) // max(1, self._num_rows))
        # Each row may be a dictionary's longest word.
        self._rows_per_batch = min(
            _MOST_ROWS, BLOCK_BYTES // self._bytes_per_row, LONGEST_DOCUMENT // max(1, largest_word)
        )
        self._rows_per_unit = max(1, unit_bytes // self._bytes_per_row)
        self._rows: Iterator[pa.RecordBatch] = iter(())
        self._rest: pa.RecordBatch | None = None
        self._position = self._num_rows
        self._size = path.stat().st_size
        self.ended = False
        self.taken = 0

    def read(self, cut: int) -> Iterator[Block]:
        start = cut * self._rows_per_unit
        end = min(start + self._rows_per_unit, self._num_rows)
        self.ended = end == self._num_rows
        self.taken = self._size * max(0, end - start) // max(1, self._num_rows)
        if start < end:
            self._go_to(start)
        while self._position < end and (batch := self._next(end - self._position)) is not None:
            self._position += batch.num_rows
            yield self._block(batch, self._position - batch.num_rows)

    def close(self) -> None:
        self._file.close()

    def _go_to(self, row: int) -> None:
        """Continue where the last unit ended, or start at the row group that holds `row`."""
        if row != self._position:
            group = max(g for g, start in enumerate(self._starts) if start <= row)
            self._rows = self._file.iter_batches(
                batch_size=max(1, self._rows_per_batch),
                row_groups=range(group, len(self._starts) - 1),
                columns=self._keys,
                use_threads=False,
            )
            self._rest, self._position = None, self._starts[group]
        while self._position < row and (batch := self._next(row - self._position)) is not None:
            self._position += batch.num_rows

    def _next(self, most: int) -> "pa.RecordBatch | None":
        """The next rows, at most so many."""
        batch = self._rest or _checked(self._path, lambda: next(self._rows, None))
        if batch is None:
            return None
        self._rest = batch.slice(most) if batch.num_rows > most else None
        return batch.slice(0, most)

    def _block(self, batch: "pa.RecordBatch", first: int) -> Block:
        columns = [_values(batch.column(key)) for key in self._keys]
        block = Block([[] for _ in columns], lines=batch.num_rows, size=batch.nbytes)
        for row, found in enumerate(zip(*columns, strict=True), first):
            if all(type(text) is str for text in found):
                for texts, text in zip(block.texts, found, strict=True):
                    texts.append(text)
            else:
                reasons = [
                    f"{_WHY_NOT[value]} under {key!r}"
                    for key, value in zip(self._keys, found, strict=True)
                    if type(value) is not str
                ]
                block.bad.append(BadLine(self._path, row, reasons[0], ""))
        return block

    def _check_columns(self) -> None:
        schema = self._file.schema_arrow
        problems = []
        for key in self._keys:
            if key not in schema.names:
                reason = f"has no column {key!r}; columns there: {', '.join(schema.names) or 'none'}"
                problems.append(Problem("--input", self._path, reason))
            elif not _holds_text(schema.field(key).type):
                reason = f"holds {schema.field(key).type} in column {key!r}, not strings"
                problems.append(Problem("--input", self._path, reason, "name a column that holds text"))
        if problems:
            raise DataError(problems)


NOT_TEXT, TOO_LONG = object(), object()
"""A string that is not UTF-8, and one longer than LONGEST_DOCUMENT."""
_WHY_NOT = {NOT_TEXT: "is not UTF-8", TOO_LONG: f"is longer than {LONGEST_DOCUMENT:,} bytes", None: "is null"}


def _open(path: Path) -> "parquet.ParquetFile":
    # Buffered: else the whole column of a row group is read at once.
    return _checked(path, lambda: parquet.ParquetFile(path, buffer_size=_READ_BUFFER, pre_buffer=False))


def _checked(path: Path, read: Callable[[], Answer]) -> Answer:
    try:
        return read()
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(Problem("--input", path, f"is damaged ({reason})", "fetch the file again")) from None


def _columns(metadata: Any, keys: Sequence[str]) -> Iterator[Any]:
    """What the file says of the columns that are read, of each row group."""
    for group in range(metadata.num_row_groups):
        columns = metadata.row_group(group)
        for index in range(columns.num_columns):
            if (column := columns.column(index)).path_in_schema in keys:
                yield column


def _uncompressed_bytes(metadata: Any, keys: Sequence[str]) -> int:
    return sum(column.total_uncompressed_size for column in _columns(metadata, keys))


def _check_sizes(path: Path, metadata: Any, keys: Sequence[str]) -> None:
    """DataError, before they are decoded, for columns that would fill the memory from a small file."""
    for column in _columns(metadata, keys):
        size, on_disk = column.total_uncompressed_size, column.total_compressed_size
        reason = f"has {size:,} bytes of {column.path_in_schema!r} in {column.num_values:,} rows"
        if size > _LARGEST_UNASKED and size > _MOST_COMPRESSED * on_disk:
            reason += f", packed into {on_disk:,}: no text is so repetitive"
            raise DataError(Problem("--input", path, reason, "leave it out"))
        if size > LONGEST_DOCUMENT * column.num_values:
            reason += f"; a document may have {LONGEST_DOCUMENT:,}"
            raise DataError(Problem("--input", path, reason, "cut its documents, or leave it out"))


def _largest_dictionary(path: Path, metadata: Any, keys: Sequence[str]) -> int:
    """Bytes, uncompressed: it is decoded as a whole. DataError where it is longer than a document may be."""
    largest = 0
    with path.open("rb") as stream:
        for column in _columns(metadata, keys):
            largest = max(largest, _dictionary_bytes(stream, column))
    if largest > LONGEST_DOCUMENT:
        reason = f"has a dictionary of {largest:,} bytes; it may have {LONGEST_DOCUMENT:,}"
        raise DataError(
            Problem("--input", path, reason, "write it without, cut its documents, or leave it out")
        )
    return largest


def _dictionary_bytes(stream: BinaryIO, column: Any) -> int:
    """Of the dictionary that a column of a row group begins with; 0 without one."""
    stream.seek(min(filter(None, (column.dictionary_page_offset, column.data_page_offset)), default=0))
    if not (header := _DICTIONARY_PAGE.match(stream.read(8))):
        return 0
    return sum((byte & 0x7F) << 7 * index for index, byte in enumerate(header[1])) >> 1


def _holds_text(kind: "pa.DataType") -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _values(column: "pa.Array") -> list[object]:
    """Strings; None for null, NOT_TEXT for bytes that are no text, TOO_LONG."""
    try:
        if not _may_be_long(column):
            return column.to_pylist()
    except UnicodeDecodeError:
        pass
    return [_value(scalar) for scalar in column]


def _may_be_long(column: "pa.Array") -> bool:
    values = column.dictionary if pa.types.is_dictionary(column.type) else column
    return (
        values.nbytes > LONGEST_DOCUMENT
        and (compute.max(compute.binary_length(values)).as_py() or 0) > LONGEST_DOCUMENT
    )


def _value(scalar: "pa.Scalar") -> object:
    if scalar.is_valid and len(_buffer(scalar)) > LONGEST_DOCUMENT:
        return TOO_LONG
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        return NOT_TEXT


def _buffer(scalar: "pa.Scalar") -> Any:
    return (scalar.value if pa.types.is_dictionary(scalar.type) else scalar).as_buffer()
