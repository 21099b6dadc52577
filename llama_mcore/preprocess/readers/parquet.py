"""Rows of Parquet files, a few pages in memory at a time."""

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import pyarrow as pa
from pyarrow import compute, parquet

from llama_mcore.errors import DataError, Problem
from llama_mcore.preprocess.readers.interface import BATCH_BYTES, LONGEST_DOCUMENT, BadLine, Batch

_READ_BUFFER = 1 << 20
_MOST_ROWS = 8192
# A column of a row group may have this many bytes whatever its size on disk; above that each byte on disk may
# stand for at most so many. Text has a ratio of 2 to 20.
_UNCHECKED_COLUMN_BYTES, _LARGEST_RATIO = 64 << 20, 200
_DICTIONARY_PAGE = re.compile(rb"\x15\x04\x15([\x80-\xff]{0,4}[\0-\x7f])", re.DOTALL)
"""Start of its header in Thrift's compact protocol: fields 1 and 2, its type and its size."""

Answer = TypeVar("Answer")


class ParquetRows:
    """Reader of a Parquet file. A unit is the rows that hold about `unit_bytes` of uncompressed data."""

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
        """Bytes of the file for each of its rows."""
        self._bytes_per_row = max(1, _uncompressed_bytes(metadata, self._keys) // max(1, self._num_rows))
        # Each row may be a dictionary's longest word.
        self._rows_per_batch = min(
            _MOST_ROWS, BATCH_BYTES // self._bytes_per_row, LONGEST_DOCUMENT // max(1, largest_word)
        )
        self._rows_per_unit = max(1, unit_bytes // self._bytes_per_row)
        self._rows: Iterator[pa.RecordBatch] = iter(())
        self._rest: pa.RecordBatch | None = None
        self._position = self._num_rows
        self._size = path.stat().st_size
        self.ended = False
        self.bytes_read = 0

    def read(self, index: int) -> Iterator[Batch]:
        start = index * self._rows_per_unit
        end = min(start + self._rows_per_unit, self._num_rows)
        self.ended = end == self._num_rows
        self.bytes_read = self._size * max(0, end - start) // max(1, self._num_rows)
        if start < end:
            self._go_to(start)
        while self._position < end and (rows := self._next(end - self._position)) is not None:
            self._position += rows.num_rows
            yield self._batch(rows, self._position - rows.num_rows)

    def close(self) -> None:
        self._file.close()

    def _go_to(self, row: int) -> None:
        """Go on from the end of the last unit if that is `row`, else from the row group that holds it."""
        if row != self._position:
            group = max(g for g, start in enumerate(self._starts) if start <= row)
            self._rows = self._file.iter_batches(
                batch_size=max(1, self._rows_per_batch),
                row_groups=range(group, len(self._starts) - 1),
                columns=self._keys,
                use_threads=False,
            )
            self._rest, self._position = None, self._starts[group]
        while self._position < row and (rows := self._next(row - self._position)) is not None:
            self._position += rows.num_rows

    def _next(self, most: int) -> "pa.RecordBatch | None":
        """The next rows, at most `most`."""
        rows = self._rest or _checked(self._path, lambda: next(self._rows, None))
        if rows is None:
            return None
        self._rest = rows.slice(most) if rows.num_rows > most else None
        return rows.slice(0, most)

    def _batch(self, rows: "pa.RecordBatch", first: int) -> Batch:
        columns = [_values(rows.column(key)) for key in self._keys]
        batch = Batch([[] for _ in columns], lines=rows.num_rows)
        for row, found in enumerate(zip(*columns, strict=True), first):
            if all(type(text) is str for text in found):
                for texts, text in zip(batch.texts, found, strict=True):
                    texts.append(text)
            else:
                reasons = [
                    f"{_WHY_NOT[value]} under {key!r}"
                    for key, value in zip(self._keys, found, strict=True)
                    if type(value) is not str
                ]
                batch.bad.append(BadLine(self._path, row, reasons[0], ""))
        return batch

    def _check_columns(self) -> None:
        schema = self._file.schema_arrow
        problems = []
        for key in self._keys:
            if key not in schema.names:
                reason = f"has no column {key!r}; its columns: {', '.join(schema.names) or 'none'}"
                problems.append(Problem("--input", self._path, reason, "name a column that holds text"))
            elif not _holds_text(schema.field(key).type):
                reason = f"holds {schema.field(key).type} in column {key!r}, not strings"
                problems.append(Problem("--input", self._path, reason, "name a column that holds text"))
        if problems:
            raise DataError(problems)


NOT_TEXT, TOO_LONG = object(), object()
"""Stand-ins for a string that is not UTF-8, and for one longer than LONGEST_DOCUMENT."""
_WHY_NOT = {NOT_TEXT: "is not UTF-8", TOO_LONG: f"is longer than {LONGEST_DOCUMENT:,} bytes", None: "is null"}


def _open(path: Path) -> "parquet.ParquetFile":
    # Buffered: else the whole column of a row group is read at once.
    return _checked(path, lambda: parquet.ParquetFile(path, buffer_size=_READ_BUFFER, pre_buffer=False))


def _checked(path: Path, read: Callable[[], Answer]) -> Answer:
    try:
        return read()
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(
            Problem("--input", path, f"is damaged ({reason})", "download the file again, or leave it out")
        ) from None


def _columns(metadata: Any, keys: Sequence[str]) -> Iterator[Any]:
    """Metadata of the columns that are read, row group by row group."""
    for group in range(metadata.num_row_groups):
        columns = metadata.row_group(group)
        for index in range(columns.num_columns):
            if (column := columns.column(index)).path_in_schema in keys:
                yield column


def _uncompressed_bytes(metadata: Any, keys: Sequence[str]) -> int:
    return sum(column.total_uncompressed_size for column in _columns(metadata, keys))


def _check_sizes(path: Path, metadata: Any, keys: Sequence[str]) -> None:
    """Refuse, before it is decoded, a column that would fill the memory from a small file."""
    for column in _columns(metadata, keys):
        size, on_disk = column.total_uncompressed_size, column.total_compressed_size
        reason = f"has {size:,} bytes of {column.path_in_schema!r} in {column.num_values:,} rows"
        if size > _UNCHECKED_COLUMN_BYTES and size > _LARGEST_RATIO * on_disk:
            reason += f", compressed to {on_disk:,}: text is never that repetitive"
            raise DataError(Problem("--input", path, reason, "leave the file out"))
        if size > LONGEST_DOCUMENT * column.num_values:
            reason += f"; a document may have at most {LONGEST_DOCUMENT:,}"
            raise DataError(Problem("--input", path, reason, "split its documents, or leave the file out"))


def _largest_dictionary(path: Path, metadata: Any, keys: Sequence[str]) -> int:
    """Uncompressed bytes of the largest dictionary, which is decoded as a whole.

    DataError where it is larger than a document may be.
    """
    largest = 0
    with path.open("rb") as stream:
        for column in _columns(metadata, keys):
            largest = max(largest, _dictionary_bytes(stream, column))
    if largest > LONGEST_DOCUMENT:
        reason = f"has a dictionary of {largest:,} bytes; it may have at most {LONGEST_DOCUMENT:,}"
        raise DataError(
            Problem(
                "--input",
                path,
                reason,
                "write it without a dictionary, split its documents, or leave the file out",
            )
        )
    return largest


def _dictionary_bytes(stream: BinaryIO, column: Any) -> int:
    """Bytes of the dictionary that a column of a row group begins with; 0 without one."""
    stream.seek(min(filter(None, (column.dictionary_page_offset, column.data_page_offset)), default=0))
    if not (header := _DICTIONARY_PAGE.match(stream.read(8))):
        return 0
    return sum((byte & 0x7F) << 7 * index for index, byte in enumerate(header[1])) >> 1


def _holds_text(kind: "pa.DataType") -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _values(column: "pa.Array") -> list[object]:
    """The strings of a column; None for null, else NOT_TEXT or TOO_LONG for one that cannot be used."""
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
