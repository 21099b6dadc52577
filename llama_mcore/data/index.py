"""Index of a megatron-core dataset: PREFIX.idx says where the documents of PREFIX.bin begin.

The .idx, little-endian (megatron/core/datasets/indexed_dataset.py, version 1):

    9 bytes  MMIDIDX\\0\\0          int32 [sequences]  tokens in each sequence
    u64      version, 1            int64 [sequences]  byte at which each begins in the .bin
    u8       code of the dtype     int64 [documents]  first sequence of each document, and one past the last
    u64      sequences
    u64      documents + 1
"""

import glob
import os
import struct
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llama_mcore.data.token_file import DiskArray
from llama_mcore.errors import DataError, MissingInputError, Problem

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
VERSION = 1
# Megatron's codes 6 and 7 are floating point: no token ids.
DTYPES: dict[int, type[np.integer]] = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    8: np.uint16,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
CHUNK = 1 << 20
_ENDINGS = (".bin", ".idx")
_REBUILD = "make it again with tools/preprocess_data.py"


def bin_path(prefix: Path | str) -> Path:
    return Path(f"{prefix}.bin")


def idx_path(prefix: Path | str) -> Path:
    return Path(f"{prefix}.idx")


def missing_dataset(field: str, prefix: str) -> Problem | None:
    """The problem of a dataset that lacks a file, with a guess at what was meant; None if it has both."""
    missing = [prefix + ending for ending in _ENDINGS if not os.path.isfile(prefix + ending)]
    if not missing:
        return None
    reason = f"no such file or folder: {', '.join(missing)}"
    stem = next((prefix.removesuffix(end) for end in _ENDINGS if prefix.endswith(end)), prefix)
    if os.path.isfile(stem + ".idx"):
        meant = stem
    else:
        of_a_key = sorted(glob.glob(f"{glob.escape(stem)}_*_document.idx"))
        meant = of_a_key[0].removesuffix(".idx") if of_a_key else ""
    if len(missing) == 1 and meant in ("", prefix):
        remedy = _REBUILD
    elif meant:
        remedy = f"did you mean {meant}?"
    elif stem != prefix:
        remedy = f"name the dataset without its ending: {stem}"
    else:
        remedy = "check the prefix, or make the dataset with tools/preprocess_data.py"
    return Problem(field, prefix, reason, remedy)


def write_index(
    path: Path, dtype: type[np.integer], documents: int, lengths: Callable[[], Iterable[NDArray[np.int32]]]
) -> None:
    """Write a .idx with one sequence a document, byte for byte as megatron-core's own builder does.

    `lengths` is called twice for the tokens in each document, in arrays of any size; nothing else is kept in
    memory.
    """
    with path.open("wb") as stream:
        stream.write(HEADER.pack(MAGIC, VERSION, CODES[dtype], documents, documents + 1))
        for chunk in lengths():
            stream.write(chunk.astype(np.int32).tobytes())
        end = 0
        for chunk in lengths():
            ends = end + np.cumsum(chunk, dtype=np.int64) * np.dtype(dtype).itemsize
            stream.write(np.concatenate(([end], ends))[:-1].astype(np.int64).tobytes())
            end = int(ends[-1]) if len(ends) else end
        for first in range(0, documents + 1, CHUNK):
            stream.write(np.arange(first, min(first + CHUNK, documents + 1), dtype=np.int64).tobytes())


class Index:
    """Index of a dataset, checked in full against itself and the size of the .bin.

    Sequences must follow each other in the .bin from its first byte to its last. The check reads the tables
    once, a chunk at a time; none of them is kept in memory or open.
    """

    def __init__(self, prefix: Path | str) -> None:
        self.prefix = str(prefix)
        self._check_files_exist()
        self.num_bytes = bin_path(prefix).stat().st_size
        self._read_header()
        self._check_sequences()
        self._check_documents()
        self.num_tokens = self.num_bytes // self.itemsize

    @property
    def itemsize(self) -> int:
        """Bytes of a token."""
        return np.dtype(self.dtype).itemsize

    def tokens(self) -> DiskArray:
        """All tokens, as one array on disk."""
        return DiskArray(bin_path(self.prefix), self.dtype, self.num_tokens)

    def document_starts(self, first: int, end: int) -> NDArray[np.int64]:
        """First token of each document of [first, end); that of document `num_documents` is the end."""
        sequences = self._documents()[first:end]
        if not len(sequences):
            return sequences
        low, high = int(sequences[0]), int(sequences[-1])
        # A document without sequences at the end begins one past the last pointer.
        pointers = np.append(self._pointers()[low : high + 1], self.num_bytes)
        return pointers[sequences - low] // self.itemsize

    def document_lengths(self) -> Iterator[NDArray[np.int64]]:
        """Tokens in each document including its EOD, a chunk of documents at a time."""
        for first in range(0, self.num_documents, CHUNK):
            end = min(first + CHUNK, self.num_documents)
            yield np.diff(self.document_starts(first, end + 1))

    def document_of(self, token: int) -> int:
        """The document that holds the token at this position."""
        starts = range(self.num_documents)
        return bisect_right(starts, token, key=lambda n: int(self.document_starts(n, n + 1)[0])) - 1

    def _lengths(self) -> DiskArray:
        return DiskArray(idx_path(self.prefix), np.int32, self.num_sequences, offset=HEADER.size)

    def _pointers(self) -> DiskArray:
        offset = HEADER.size + 4 * self.num_sequences
        return DiskArray(idx_path(self.prefix), np.int64, self.num_sequences, offset=offset)

    def _documents(self) -> DiskArray:
        offset = HEADER.size + 12 * self.num_sequences
        return DiskArray(idx_path(self.prefix), np.int64, self.num_documents + 1, offset=offset)

    def _check_files_exist(self) -> None:
        if problem := missing_dataset("dataset", self.prefix):
            raise MissingInputError(problem)

    def _read_header(self) -> None:
        """Read dtype and counts, and check the counts against the size of the .idx."""
        path = idx_path(self.prefix)
        with path.open("rb") as stream:
            header = stream.read(HEADER.size)
        if len(header) < HEADER.size or not header.startswith(MAGIC):
            raise self._damaged(path, "is not the index of a megatron-core dataset")
        _, version, code, sequences, documents = HEADER.unpack(header)
        if version != VERSION or code not in DTYPES:
            raise self._damaged(path, f"has version {version} and dtype code {code}, which are not supported")
        expected, actual = HEADER.size + 12 * sequences + 8 * documents, path.stat().st_size
        if actual != expected:
            raise self._damaged(path, f"has {actual:,} bytes, but its header requires {expected:,}")
        if not sequences or documents < 2:
            raise self._damaged(path, "holds no documents")
        self.dtype = DTYPES[code]
        self.num_sequences, self.num_documents = sequences, documents - 1

    def _check_sequences(self) -> None:
        lengths, pointers = self._lengths(), self._pointers()
        end = 0
        for first in range(0, len(lengths), CHUNK):
            chunk = lengths[first : first + CHUNK].astype(np.int64)
            ends = end + np.cumsum(chunk) * self.itemsize
            starts = np.concatenate(([end], ends[:-1]))
            if chunk.min() < 0 or not np.array_equal(starts, pointers[first : first + CHUNK]):
                reason = f"has a negative length or a wrong pointer at or after sequence {first:,}"
                raise self._damaged(idx_path(self.prefix), reason)
            end = int(ends[-1])
            if end > self.num_bytes:
                break
        if end != self.num_bytes:
            least = "at least " if end > self.num_bytes else ""
            reason = f"has {self.num_bytes:,} bytes, but the .idx requires {least}{end:,}"
            raise self._damaged(bin_path(self.prefix), reason)
        if not end:
            raise self._damaged(bin_path(self.prefix), "holds no tokens")

    def _check_documents(self) -> None:
        documents = self._documents()
        ordered = all(
            bool(np.all(np.diff(documents[first : first + CHUNK + 1]) >= 0))
            for first in range(0, len(documents), CHUNK)
        )
        if documents[0] != 0 or documents[-1] != self.num_sequences or not ordered:
            reason = f"does not list documents in order from sequence 0 to {self.num_sequences:,}"
            raise self._damaged(idx_path(self.prefix), reason)

    def _damaged(self, path: Path, reason: str) -> DataError:
        return DataError(Problem("dataset", path, reason, _REBUILD))
