"""Verification of a dataset against its manifest: quickly when it is opened, or every byte of it."""

import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llama_mcore.data.index import Index, bin_path, idx_path
from llama_mcore.data.manifest import (
    BLOCK_BYTES,
    REMEDY,
    DatasetManifest,
    file_sha256,
    ids_outside,
    manifest_path,
)
from llama_mcore.errors import Problem

# Hashed at every open up to this size, which takes 50 ms. A longer index, of millions of documents, is still
# checked in full against itself and the size of the .bin: only borders of documents are left to `--verify`.
HASHED_INDEX_BYTES = 64 << 20


@dataclass(frozen=True)
class Damage:
    """Bytes [first_byte, end_byte) of the .bin; documents `first_document` to `last_document` lie in them."""

    block: int
    first_byte: int
    end_byte: int
    first_document: int
    last_document: int
    reason: str

    def __str__(self) -> str:
        return (
            f"block {self.block:,} {self.reason}: bytes {self.first_byte:,} to {self.end_byte - 1:,}, "
            f"documents {self.first_document:,} to {self.last_document:,}"
        )

    def problem(self, index: Index) -> Problem:
        return Problem("dataset", bin_path(index.prefix), str(self), REMEDY)


def open_problems(manifest: DatasetManifest | None, index: Index) -> list[Problem]:
    """Problems found at opening: in the counts, in the first and last block, and in a short index."""
    if not manifest:
        return []
    if problems := count_problems(manifest, index):
        return problems
    if idx_path(index.prefix).stat().st_size <= HASHED_INDEX_BYTES:
        problems = index_problems(manifest, index)
    ends = sorted({0, len(manifest.block_checksums) - 1})
    return problems + [each.problem(index) for each in damaged_blocks(manifest, index, blocks=ends)]


def count_problems(manifest: DatasetManifest, index: Index) -> list[Problem]:
    """Numbers that the manifest and the header of the index state differently."""
    pairs = {
        "dtype": (manifest.dtype, np.dtype(index.dtype).name),
        "documents": (manifest.documents, index.num_documents),
        "tokens": (manifest.tokens, index.num_tokens),
        "blocks": (len(manifest.block_checksums), -(-index.num_bytes // manifest.block_bytes)),
    }
    return [
        Problem(f"{manifest_path(index.prefix)} {name}", stated, f"the dataset has {actual}", REMEDY)
        for name, (stated, actual) in pairs.items()
        if stated != actual
    ]


def index_problems(manifest: DatasetManifest, index: Index) -> list[Problem]:
    """The problem of an index that the manifest was not written for, if it is one."""
    path = idx_path(index.prefix)
    if file_sha256(path) == manifest.idx_sha256:
        return []
    return [
        Problem(
            "dataset", path, f"does not have the SHA-256 that {manifest_path(index.prefix)} states", REMEDY
        )
    ]


def damaged_blocks(
    manifest: DatasetManifest | None,
    index: Index,
    *,
    blocks: Sequence[int] | None = None,
    vocab_size: int | None = None,
    advance: Callable[[int], None] = lambda size: None,
) -> Iterator[Damage]:
    """Blocks whose checksum is wrong or which hold ids outside the vocabulary; `blocks`: of these alone.

    Without a manifest there are no checksums to compare, and without `vocab_size` ids are not checked.
    `advance` is called with the bytes read since the last call.
    """
    tokens = index.tokens()
    block_tokens = (manifest.block_bytes if manifest else BLOCK_BYTES) // index.itemsize
    for number in range(-(-len(tokens) // block_tokens)) if blocks is None else blocks:
        first = number * block_tokens
        block = tokens[first : first + block_tokens]
        if reason := _damage(manifest, number, block, vocab_size):
            yield _locate(index, number, first, first + len(block), reason)
        advance(block.nbytes)


def _damage(
    manifest: DatasetManifest | None, number: int, block: NDArray[Any], vocab_size: int | None
) -> str:
    reasons = []
    if manifest and zlib.crc32(block.data) != manifest.block_checksums[number]:
        reasons.append("does not match its checksum")
    if vocab_size and (outside := ids_outside(block, vocab_size)):
        reasons.append(f"holds {outside:,} token ids outside the vocabulary of {vocab_size:,}")
    return " and ".join(reasons)


def _locate(index: Index, number: int, first: int, end: int, reason: str) -> Damage:
    return Damage(
        number,
        first * index.itemsize,
        end * index.itemsize,
        index.document_of(first),
        index.document_of(end - 1),
        reason,
    )
