"""Fixed windows over the tokens of a source: window w is tokens [w * seq_length, (w + 1) * seq_length].

Windows are read in numpy. C++ with the same reads and checks made micro-batches of 8 x 2,048 tokens in 13 us
instead of 29: not worth a compiler, since more than half of that time is the system's.
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


class ConcatenatedWindows:
    """Windows numbered through several datasets, from the number that each of them has."""

    def __init__(self, windows: Iterable[int]) -> None:
        self._first = list(accumulate(windows, initial=0))
        self.num_windows = self._first[-1]

    def locate(self, window: int) -> tuple[int, int]:
        """The dataset that holds a window, and the number of the window in that dataset."""
        if not 0 <= window < self.num_windows:
            raise IndexError(f"window {window:,} of {self.num_windows:,}")
        dataset = bisect_right(self._first, window) - 1
        return dataset, window - self._first[dataset]


class WindowDataset:
    """Windows of `seq_length` tokens and the token after them, so that each token has a label.

    Windows overlap by that one token, so every token but the first is predicted once. The last tokens, fewer
    than a window, are left out. Documents follow each other inside a window. Of several datasets the windows
    are numbered through, and none crosses from one dataset to the next.

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
        self.datasets = [IndexedDataset(prefix) for prefix in prefixes]
        self._check_vocabulary()
        self._windows = ConcatenatedWindows(max(0, (d.num_tokens - 1) // seq_length) for d in self.datasets)
        self.num_windows = self._windows.num_windows
        if self.num_windows < 1:
            tokens = sum(dataset.num_tokens for dataset in self.datasets)
            reason = f"holds {tokens:,} tokens; one window needs model.seq_length + 1 = {seq_length + 1:,}"
            raise DataError(
                Problem("dataset", self.prefix, reason, "give more text or a shorter model.seq_length")
            )

    @property
    def content_id(self) -> str:
        """Hash of the tokens in their order, whatever the files are called."""
        ids = [dataset.content_id for dataset in self.datasets]
        return ids[0] if len(ids) == 1 else hashlib.sha256(" ".join(ids).encode()).hexdigest()

    @property
    def tokenizer_vocab_size(self) -> int:
        """Vocabulary size of the tokenizer that the datasets were made with; 0 if unknown."""
        return max((d.manifest.vocab_size or 0 for d in self.datasets if d.manifest), default=0)

    @property
    def bytes_per_token(self) -> float | None:
        """Bytes of text per token; None unless all datasets know it."""
        text = [d.manifest.text_bytes if d.manifest else None for d in self.datasets]
        known = [size for size in text if size is not None]
        return sum(known) / sum(d.num_tokens for d in self.datasets) if len(known) == len(text) else None

    def locate(self, window: int) -> tuple[DiskArray, int]:
        """The array that holds a window, and the position of its first token there."""
        dataset, number = self._windows.locate(window)
        return self.datasets[dataset].tokens, number * self.seq_length

    def read(self, windows: Iterable[int]) -> NDArray[np.integer[Any]]:
        """Token ids [n, s + 1] of these windows, as `read_windows` gives them."""
        return read_windows([Window(self, int(window)) for window in windows])

    def check_ids(self, ids: NDArray[np.integer[Any]], window: int) -> None:
        """Raise DataError if ids [s + 1] of a window are outside the vocabulary."""
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
                dataset.prefix,
                f"was made with a vocabulary of {size}; model.vocab_size = {self.vocab_size}",
                _OTHER_VOCABULARY,
            )
            for dataset in self.datasets
            if dataset.manifest and (size := dataset.manifest.vocab_size or 0) > self.vocab_size
        ]
        if problems:
            raise DataError(problems)


class Window(NamedTuple):
    dataset: WindowDataset
    number: int


def read_windows(windows: Sequence[Window]) -> NDArray[np.integer[Any]]:
    """Token ids [n, s + 1] of one window or more, in the smallest dtype that holds all of them.

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


_OTHER_VOCABULARY = "use the tokenizer of the model, or set model.vocab_size to the size of the dataset's"
