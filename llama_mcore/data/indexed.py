"""megatron-core's indexed dataset: PREFIX.bin holds the tokens, PREFIX.idx says where documents begin.

The .idx, little-endian (megatron/core/datasets/indexed_dataset.py, version 1):

    9 bytes  MMIDIDX\\0\\0          int32 [sequences]  tokens in each sequence
    u64      version, 1            int64 [sequences]  byte at which each begins in the .bin
    u8       code of the dtype     int64 [documents]  first sequence of each document, and one past the last
    u64      sequences
    u64      documents + 1

What is written here has one sequence a document and is byte for byte what megatron-core's own builder
writes. Reading takes any layout of it whose sequences lie in the .bin one after the other. Neither imports
megatron or torch.
"""

import os
import struct
import tempfile
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from llama_mcore.data.files import output_errors, prepare_output, replace_durably, temporary_name
from llama_mcore.errors import DataError, MissingInputError, Problem

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_VERSION = 1
# Megatron's codes 6 and 7 are floating point: no token ids.
_DTYPES: dict[int, type[np.integer]] = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    8: np.uint16,
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_CHUNK = 1 << 20
_REBUILD = "make it again with tools/preprocess_data.py"


def bin_path(prefix: Path | str) -> Path:
    return Path(f"{prefix}.bin")


def idx_path(prefix: Path | str) -> Path:
    return Path(f"{prefix}.idx")


def optimal_dtype(vocab_size: int) -> type[np.integer]:
    """Megatron's rule: uint16 when the vocabulary fits with some room, else int32."""
    return np.uint16 if vocab_size < 65500 else np.int32


class IndexedWriter:
    """Streams documents to PREFIX.bin and PREFIX.idx in memory that does not grow with their number.

    Use it in a `with` block: both files appear when the block succeeds, neither when it fails. An older
    dataset under that prefix is replaced.
    """

    def __init__(self, prefix: Path | str, dtype: type[np.integer]) -> None:
        self.bin_path, self.idx_path = bin_path(prefix), idx_path(prefix)
        self.dtype = dtype
        self.num_documents = self.num_tokens = 0
        prepare_output(self.bin_path)
        prepare_output(self.idx_path)
        with output_errors(self.bin_path):
            self._lengths = tempfile.TemporaryFile(dir=self.bin_path.parent)  # noqa: SIM115
            self._bin = temporary_name(self.bin_path).open("wb")

    def __enter__(self) -> "IndexedWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                with output_errors(self.bin_path):
                    self._publish()
        finally:
            self._discard()

    def add_documents(self, tokens: NDArray[np.integer], lengths: NDArray[np.int32]) -> None:
        """Append documents: `tokens` of all of them one after the other, and how many each has."""
        with output_errors(self.bin_path):
            self._bin.write(np.ascontiguousarray(tokens, dtype=self.dtype).tobytes())
            self._lengths.write(np.ascontiguousarray(lengths, dtype=np.int32).tobytes())
        self.num_documents += len(lengths)
        self.num_tokens += len(tokens)

    def _publish(self) -> None:
        """.bin before .idx: a reader opens the .idx first, so it never meets an index without its tokens."""
        self._bin.close()
        self._write_index()
        self.idx_path.unlink(missing_ok=True)
        replace_durably(temporary_name(self.bin_path), self.bin_path)
        replace_durably(temporary_name(self.idx_path), self.idx_path)

    def _write_index(self) -> None:
        sequences = self.num_documents
        with temporary_name(self.idx_path).open("wb") as stream:
            stream.write(_HEADER.pack(_MAGIC, _VERSION, _CODES[self.dtype], sequences, sequences + 1))
            for lengths in self._written_lengths():
                stream.write(lengths.tobytes())
            pointer = 0
            for lengths in self._written_lengths():
                ends = pointer + np.cumsum(lengths, dtype=np.int64) * np.dtype(self.dtype).itemsize
                stream.write(np.concatenate(([pointer], ends[:-1])).astype(np.int64).tobytes())
                pointer = int(ends[-1])
            for first in range(0, sequences + 1, _CHUNK):
                stream.write(np.arange(first, min(first + _CHUNK, sequences + 1), dtype=np.int64).tobytes())

    def _written_lengths(self) -> Iterator[NDArray[np.int32]]:
        self._lengths.seek(0)
        while chunk := self._lengths.read(_CHUNK * np.dtype(np.int32).itemsize):
            yield np.frombuffer(chunk, dtype=np.int32)

    def _discard(self) -> None:
        self._bin.close()
        self._lengths.close()
        temporary_name(self.bin_path).unlink(missing_ok=True)
        temporary_name(self.idx_path).unlink(missing_ok=True)


class IndexedDataset:
    """Reads PREFIX.bin through a memory map, after checking that .idx and .bin agree with each other.

    `tokens` is the whole dataset as one stream, in the dtype of the file.
    """

    def __init__(self, prefix: Path | str) -> None:
        self.prefix = str(prefix)
        self._check_files_exist()
        sequences, documents = self._read_header()
        lengths = self._map(np.int32, sequences, offset=_HEADER.size)
        self._pointers = self._map(np.int64, sequences, offset=_HEADER.size + 4 * sequences)
        self._documents = self._map(np.int64, documents, offset=_HEADER.size + 12 * sequences)
        self._check_sequences(lengths)
        self._check_documents()
        self.num_tokens = bin_path(prefix).stat().st_size // np.dtype(self.dtype).itemsize
        self.tokens = np.memmap(bin_path(prefix), dtype=self.dtype, mode="r")

    @property
    def num_documents(self) -> int:
        return len(self._documents) - 1

    @cached_property
    def document_lengths(self) -> NDArray[np.int64]:
        """Tokens in each document, its end token counted."""
        starts = np.append(self._pointers, bin_path(self.prefix).stat().st_size)[self._documents]
        return np.diff(starts) // np.dtype(self.dtype).itemsize

    def _map(self, dtype: type[np.integer], count: int, *, offset: int) -> "np.memmap":
        return np.memmap(idx_path(self.prefix), dtype=dtype, mode="r", offset=offset, shape=(count,))

    def _check_files_exist(self) -> None:
        missing = [
            path for path in (idx_path(self.prefix), bin_path(self.prefix)) if not os.path.isfile(path)
        ]
        if missing:
            remedy = "make it with tools/preprocess_data.py; a dataset is named without .bin and .idx"
            raise MissingInputError([Problem("dataset", path, "no such file", remedy) for path in missing])

    def _read_header(self) -> tuple[int, int]:
        """Sets `dtype`; returns the lengths of the two tables once the size of the .idx confirms them."""
        path = idx_path(self.prefix)
        with path.open("rb") as stream:
            header = stream.read(_HEADER.size)
        if len(header) < _HEADER.size or not header.startswith(_MAGIC):
            raise self._damaged(path, "is not the index of a megatron-core dataset")
        _, version, code, sequences, documents = _HEADER.unpack(header)
        if version != _VERSION or code not in _DTYPES:
            raise self._damaged(path, f"has version {version} and dtype code {code}, which are not known")
        expected, actual = _HEADER.size + 12 * sequences + 8 * documents, path.stat().st_size
        if actual != expected:
            raise self._damaged(path, f"has {actual:,} bytes where its header asks for {expected:,}")
        if not sequences or not documents:
            raise self._damaged(path, "holds no documents")
        self.dtype = _DTYPES[code]
        return sequences, documents

    def _check_sequences(self, lengths: "np.memmap") -> None:
        """Sequences must lie one after the other from the first byte of the .bin to its last."""
        end = 0
        for first in range(0, len(lengths), _CHUNK):
            chunk = np.asarray(lengths[first : first + _CHUNK], dtype=np.int64)
            ends = end + np.cumsum(chunk) * np.dtype(self.dtype).itemsize
            starts = np.concatenate(([end], ends[:-1]))
            if chunk.min() < 0 or not np.array_equal(starts, self._pointers[first : first + _CHUNK]):
                bound = f"has a negative length or a wrong pointer at or after sequence {first:,}"
                raise self._damaged(idx_path(self.prefix), bound)
            end = int(ends[-1])
        actual = bin_path(self.prefix).stat().st_size
        if actual != end:
            raise self._damaged(
                bin_path(self.prefix), f"has {actual:,} bytes where the .idx asks for {end:,}"
            )
        if not end:
            raise self._damaged(bin_path(self.prefix), "holds no tokens")

    def _check_documents(self) -> None:
        index = self._documents
        ordered = all(
            bool(np.all(np.diff(index[first : first + _CHUNK + 1]) >= 0))
            for first in range(0, len(index), _CHUNK)
        )
        if index[0] != 0 or index[-1] != len(self._pointers) or not ordered:
            bound = f"must list documents in order from sequence 0 to {len(self._pointers):,}"
            raise self._damaged(idx_path(self.prefix), bound)

    def _damaged(self, path: Path, bound: str) -> DataError:
        return DataError(Problem("dataset", path, bound, _REBUILD))
