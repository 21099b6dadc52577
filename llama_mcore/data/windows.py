"""Fixed windows over a token stream: sample w reads tokens [w * seq_length, (w + 1) * seq_length].

Windows are read in numpy. C++ with the same reads and checks made micro-batches of 8 x 2,048 tokens 2.2 to
2.9 times as fast, in 13 us instead of 29: too little for a compiler, as more than half of it is the system's.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from llama_mcore.data.indexed_dataset import IndexedDataset
from llama_mcore.data.token_file import DiskArray
from llama_mcore.errors import DataError, Problem


class Parts:
    """Windows numbered through the parts of a source, from how many each part has."""

    def __init__(self, windows: Iterable[int]) -> None:
        self._first = list(accumulate(windows, initial=0))
        self.num_windows = self._first[-1]

    def locate(self, window: int) -> tuple[int, int]:
        """The part that holds a window, and which one of that part's it is."""
        if not 0 <= window < self.num_windows:
            raise IndexError(f"window {window:,} of {self.num_windows:,}")
        part = bisect_right(self._first, window) - 1
        return part, window - self._first[part]


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
        self._parts = Parts(max(0, (part.num_tokens - 1) // seq_length) for part in self.parts)
        self.num_windows = self._parts.num_windows
        if self.num_windows < 1:
            tokens = sum(part.num_tokens for part in self.parts)
            reason = f"holds {tokens} tokens; one window needs model.seq_length + 1 = {seq_length + 1}"
            raise DataError(
                Problem("dataset", self.prefix, reason, "give more text or a shorter model.seq_length")
            )

    @property
    def content_id(self) -> str:
        """Names the tokens and their order, whatever the files are called."""
        ids = [part.content_id for part in self.parts]
        return ids[0] if len(ids) == 1 else hashlib.sha256(" ".join(ids).encode()).hexdigest()

    @property
    def tokenizer_vocab_size(self) -> int:
        """Of the tokenizer that the parts were made with; 0 where nobody knows."""
        return max((part.manifest.vocab_size or 0 for part in self.parts if part.manifest), default=0)

    @property
    def bytes_per_token(self) -> float | None:
        """Of the text that became tokens, if all parts know it."""
        text = [part.manifest.text_bytes if part.manifest else None for part in self.parts]
        known = [size for size in text if size is not None]
        return sum(known) / sum(p.num_tokens for p in self.parts) if len(known) == len(text) else None

    def locate(self, window: int) -> tuple[DiskArray, int]:
        """The stream that holds a window, and its first token there."""
        part, number = self._parts.locate(window)
        return self.parts[part].tokens, number * self.seq_length

    def read(self, windows: Iterable[int]) -> NDArray[np.integer[Any]]:
        """`read_windows` of this dataset alone."""
        return read_windows([Window(self, int(window)) for window in windows])

    def check_ids(self, ids: NDArray[np.integer[Any]], window: int) -> None:
        """Raise DataError where ids [s + 1] of a window are not in the vocabulary."""
        if self.vocab_size is None or not _holds_outside(ids, self.vocab_size):
            return
        first = int(ids[(ids < 0) | (ids >= self.vocab_size)][0])
        reason = f"holds token id {first} in window {window:,}; model.vocab_size = {self.vocab_size}"
        raise DataError(Problem("dataset", self.prefix, reason, _OTHER_VOCABULARY))

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


class Window(NamedTuple):
    dataset: WindowDataset
    number: int


def read_windows(windows: Sequence[Window]) -> NDArray[np.integer[Any]]:
    """Token ids [n, s + 1] of at least one window, in the smallest dtype that holds those of all their files.

    Raises DataError for an id outside the vocabulary, and for a file that can no longer be read.
    """
    rows = [dataset.locate(number) for dataset, number in windows]
    dtype = np.result_type(*{stream.dtype for stream, _ in rows})
    ids = np.empty((len(rows), windows[0].dataset.seq_length + 1), dtype)
    for row, (stream, first) in zip(ids, rows, strict=True):
        if stream.dtype == dtype:
            stream.read_into(first, row)
        else:
            row[:] = stream[first : first + len(row)]
    vocabularies = [dataset.vocab_size for dataset, _ in windows if dataset.vocab_size is not None]
    if vocabularies and _holds_outside(ids, min(vocabularies)):
        for row, (dataset, number) in zip(ids, windows, strict=True):
            dataset.check_ids(row, number)
    return ids


def _holds_outside(ids: NDArray[np.integer[Any]], vocab_size: int) -> bool:
    return bool(ids.max() >= vocab_size or (ids.dtype.kind == "i" and ids.min() < 0))


_OTHER_VOCABULARY = "use the tokenizer of the model, or set model.vocab_size to its size"
