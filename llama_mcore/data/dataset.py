"""Fixed windows over a token stream: sample w reads tokens [w * seq_length, (w + 1) * seq_length]."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llama_mcore.data.indexed import IndexedDataset
from llama_mcore.errors import DataError, Problem


class WindowDataset:
    """Windows of `seq_length` tokens and the token after them, so that all have a label.

    Windows overlap by that one token, so every token but the first is predicted once. The last tokens, fewer
    than a window, are left out. Documents follow each other inside a window. Several datasets are parts of
    one source: windows are numbered through them and none crosses from one to the next.

    With `vocab_size` each window is checked as it is read: an id outside would read past the embedding table.
    Raises DataError for datasets too short for one window or made with more tokens than the vocabulary has.
    """

    def __init__(
        self, prefix: Path | str | Sequence[Path | str], seq_length: int, vocab_size: int | None = None
    ) -> None:
        prefixes = [prefix] if isinstance(prefix, str | Path) else list(prefix)
        self.prefix = ", ".join(map(str, prefixes))
        self.seq_length = seq_length
        self.vocab_size = vocab_size
        self.parts = [IndexedDataset(part) for part in prefixes]
        self._check_vocabulary()
        windows = [max(0, (part.num_tokens - 1) // seq_length) for part in self.parts]
        self._first = np.concatenate(([0], np.cumsum(windows, dtype=np.int64)))
        self.num_windows = int(self._first[-1])
        if self.num_windows < 1:
            tokens = sum(part.num_tokens for part in self.parts)
            bound = f"holds {tokens} tokens; one window needs model.seq_length + 1 = {seq_length + 1}"
            raise DataError(
                Problem("dataset", self.prefix, bound, "give more text or a shorter model.seq_length")
            )

    @property
    def content_id(self) -> str:
        """Names the tokens and their order, whatever the files are called."""
        ids = [part.content_id for part in self.parts]
        return ids[0] if len(ids) == 1 else hashlib.sha256(" ".join(ids).encode()).hexdigest()

    @property
    def tokenizers(self) -> set[str]:
        """SHA-256 of the tokenizers that the parts were made with, as far as they are known."""
        known = (part.manifest.tokenizer_sha256 for part in self.parts if part.manifest)
        return {sha256 for sha256 in known if sha256}

    @property
    def bytes_per_token(self) -> float | None:
        """Of the text that became tokens, if all parts know it."""
        text = [part.manifest.text_bytes if part.manifest else None for part in self.parts]
        known = [size for size in text if size is not None]
        return sum(known) / sum(p.num_tokens for p in self.parts) if len(known) == len(text) else None

    def read(self, windows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Token ids [n, s + 1] of `windows` [n]. Raises DataError for an id outside the vocabulary."""
        if windows.size and not 0 <= windows.min() <= windows.max() < self.num_windows:
            raise IndexError(f"windows {windows.min()} to {windows.max()} of {self.num_windows}")
        ids = np.empty((len(windows), self.seq_length + 1), dtype=np.int64)
        parts = np.searchsorted(self._first, windows, side="right") - 1
        starts = (windows - self._first[parts]) * self.seq_length
        for row, part, start in zip(ids, parts, starts, strict=True):
            row[:] = self.parts[part].tokens[start : start + self.seq_length + 1]
        self._check_ids(ids, windows)
        return ids

    def _check_ids(self, ids: NDArray[np.int64], windows: NDArray[np.int64]) -> None:
        if self.vocab_size is None:
            return
        rows, columns = np.nonzero((ids < 0) | (ids >= self.vocab_size))
        if rows.size:
            bound = (
                f"holds token id {ids[rows[0], columns[0]]} in window {windows[rows[0]]:,}; "
                f"model.vocab_size = {self.vocab_size}"
            )
            raise DataError(Problem("dataset", self.prefix, bound, _OTHER_VOCABULARY))

    def _check_vocabulary(self) -> None:
        if self.vocab_size is None:
            return
        problems = [
            Problem(
                "dataset",
                part.prefix,
                f"was made with {part.manifest.vocab_size} tokens; model.vocab_size = {self.vocab_size}",
                _OTHER_VOCABULARY,
            )
            for part in self.parts
            if part.manifest and (part.manifest.vocab_size or 0) > self.vocab_size
        ]
        if problems:
            raise DataError(problems)


_OTHER_VOCABULARY = "use the tokenizer of the model, or set model.vocab_size to its size"
