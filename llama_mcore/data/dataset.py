"""Fixed windows over a token stream: sample w reads tokens [w * seq_length, (w + 1) * seq_length]."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llama_mcore.data.indexed import IndexedDataset
from llama_mcore.errors import DataError, Problem


class WindowDataset:
    """Windows of `seq_length` tokens and, as labels, the same shifted by one.

    Windows overlap by the one token that is a label of one and an input of the next, so every token but the
    first is predicted once. The last tokens, fewer than a window, are left out. Documents follow each other
    inside a window.
    With `vocab_size` each window is checked as it is read: an id outside would read past the embedding table.
    """

    def __init__(self, prefix: Path | str, seq_length: int, vocab_size: int | None = None) -> None:
        self.prefix = str(prefix)
        self.seq_length = seq_length
        self.vocab_size = vocab_size
        self._tokens = IndexedDataset(prefix).tokens
        self.num_windows = (len(self._tokens) - 1) // seq_length
        if self.num_windows < 1:
            bound = (
                f"holds {len(self._tokens)} tokens; one window needs model.seq_length + 1 = {seq_length + 1}"
            )
            raise DataError(Problem("dataset", prefix, bound, "give more text or a shorter model.seq_length"))

    def __len__(self) -> int:
        return self.num_windows

    def __getitem__(self, window: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Tokens [s] and labels [s] of one window."""
        if not 0 <= window < self.num_windows:
            raise IndexError(f"window {window} of {self.num_windows}")
        first = window * self.seq_length
        ids = np.asarray(self._tokens[first : first + self.seq_length + 1], dtype=np.int64)
        self._check_ids(ids, window)
        return ids[:-1], ids[1:]

    def _check_ids(self, ids: NDArray[np.int64], window: int) -> None:
        if self.vocab_size is None:
            return
        outside = ids[(ids < 0) | (ids >= self.vocab_size)]
        if outside.size:
            bound = f"holds token id {outside[0]} in window {window:,}; model.vocab_size = {self.vocab_size}"
            raise DataError(
                Problem(
                    "dataset",
                    self.prefix,
                    bound,
                    "use the tokenizer of the model, or set model.vocab_size to its size",
                )
            )
