"""Writer and reader of megatron-core's indexed datasets, without an import of megatron or torch.

PREFIX.bin holds the tokens, PREFIX.idx says where documents begin. The writer puts one sequence in each
document, byte for byte as megatron-core's own builder does. The reader takes any dataset whose sequences
follow each other in the .bin.
"""

import hashlib
import os
import sys
import tempfile
from collections.abc import Iterator
from functools import cache, cached_property
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from llama_mcore.data.index import Index, bin_path, idx_path, write_index
from llama_mcore.data.manifest import DatasetManifest, file_sha256, manifest_path, read_manifest
from llama_mcore.data.verify import open_problems
from llama_mcore.errors import DataError, Problem
from llama_mcore.files import output_errors, prepare_output, replace_durably, temporary_name

CHUNK = 1 << 20


def optimal_dtype(vocab_size: int) -> type[np.integer]:
    """dtype of tokens by Megatron's rule: uint16 if the vocabulary fits with some room, else int32."""
    return np.uint16 if vocab_size < 65500 else np.int32


class IndexedWriter:
    """Writer of PREFIX.bin and PREFIX.idx, in memory that does not grow with the number of documents.

    Use it in a `with` block: both files appear if the block succeeds, neither if it fails. An older dataset
    of that prefix is replaced.
    """

    def __init__(self, prefix: Path | str, dtype: type[np.integer]) -> None:
        self.prefix = str(prefix)
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

    def add_documents(self, tokens: NDArray[np.integer], lengths: NDArray[np.integer]) -> None:
        """Append documents: the tokens of all of them one after the other, and the length of each.

        Raises DataError if a token does not fit into the dtype, or a length into the 32 bits of the index.
        """
        _refuse_outside("token id", tokens, self.dtype)
        _refuse_outside("tokens in a document", lengths, np.int32)
        if lengths.sum(dtype=np.int64) != len(tokens):
            raise ValueError(f"{len(tokens)} tokens in documents of {lengths.sum(dtype=np.int64)}")
        with output_errors(self.bin_path):
            self._bin.write(np.ascontiguousarray(tokens, dtype=self.dtype).tobytes())
            self._lengths.write(np.ascontiguousarray(lengths, dtype=np.int32).tobytes())
        self.num_documents += len(lengths)
        self.num_tokens += len(tokens)

    def _publish(self) -> None:
        # .bin before .idx: a reader opens the .idx first, so that it never meets an index without its tokens.
        self._bin.close()
        write_index(temporary_name(self.idx_path), self.dtype, self.num_documents, self._written_lengths)
        self.idx_path.unlink(missing_ok=True)
        manifest_path(self.prefix).unlink(missing_ok=True)
        replace_durably(temporary_name(self.bin_path), self.bin_path)
        replace_durably(temporary_name(self.idx_path), self.idx_path)

    def _written_lengths(self) -> Iterator[NDArray[np.int32]]:
        self._lengths.seek(0)
        while chunk := self._lengths.read(CHUNK * np.dtype(np.int32).itemsize):
            yield np.frombuffer(chunk, dtype=np.int32)

    def _discard(self) -> None:
        self._bin.close()
        self._lengths.close()
        temporary_name(self.bin_path).unlink(missing_ok=True)
        temporary_name(self.idx_path).unlink(missing_ok=True)


def _refuse_outside(what: str, values: NDArray[np.integer], dtype: type[np.integer]) -> None:
    # numpy would wrap them around: 70,000 as uint16 is 4,464.
    limits = np.iinfo(dtype)
    if not values.size or np.can_cast(values.dtype, dtype):
        return
    for value in (int(values.min()), int(values.max())):
        if not limits.min <= value <= limits.max:
            reason = f"must be from {limits.min:,} to {limits.max:,}, which {limits.dtype} holds"
            raise DataError(Problem(what, value, reason))


class IndexedDataset:
    """Dataset on disk, checked at opening: its files agree with each other and with its manifest.

    `tokens` is the whole dataset as one array on disk, in the dtype of the file; its slices are arrays in
    memory. A dataset without a manifest opens with a warning.
    """

    def __init__(self, prefix: Path | str) -> None:
        self.prefix = str(prefix)
        self.index = Index(prefix)
        self.manifest = read_manifest(prefix)
        if problems := open_problems(self.manifest, self.index):
            raise DataError(problems)
        if not self.manifest:
            _warn_without_manifest(self.prefix)
        self.dtype = self.index.dtype
        self.num_tokens = self.index.num_tokens
        self.num_documents = self.index.num_documents
        self.tokens = self.index.tokens()

    @cached_property
    def content_id(self) -> str:
        return content_id(self.index, self.manifest)

    @cached_property
    def document_lengths(self) -> NDArray[np.int64]:
        """Tokens in each document, including its EOD."""
        return np.concatenate(list(self.index.document_lengths()))

    def document(self, number: int) -> NDArray[np.integer]:
        """Tokens of one document, including its EOD."""
        first, end = self.index.document_starts(number, number + 2)
        return self.tokens[int(first) : int(end)]


def content_id(index: Index, manifest: DatasetManifest | None) -> str:
    """Hash of tokens and documents. Without a manifest it does not see a change inside the .bin."""
    if manifest:
        return manifest.content_id
    content = f"{file_sha256(idx_path(index.prefix))} {index.num_bytes}"
    return f"index-only-sha256:{hashlib.sha256(content.encode()).hexdigest()}"


@cache
def _warn_without_manifest(prefix: str) -> None:
    # Every rank opens the dataset; the first of a node speaks.
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(
            f"warning: dataset {prefix} has no manifest: its tokenizer is unknown, and changed tokens go "
            f"unnoticed; add one with `llama-mcore inspect-dataset {prefix} --write-manifest "
            "--tokenizer-model MODEL`",
            file=sys.stderr,
            flush=True,
        )
