"""Micro-batches of one data-parallel rank.

Sample k of step n has the global position n * global_batch_size + k whatever the layout; layouts differ only
in which rank and micro-batch reads it. So the samples of a step do not depend on dp or micro_batch_size.
"""

import threading
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from itertools import count
from queue import SimpleQueue
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.profiler import record_function

from llama_mcore.data.data_plan import Segment
from llama_mcore.data.sample_order import windows_at
from llama_mcore.data.windows import Window, WindowDataset, read_windows

# Samples of all ranks. Finding the window of one sample takes hardly less time than those of so many.
SAMPLES_PLANNED_AT_ONCE = 1024
# Not the seed of the run: runs of different seeds are compared on the same windows.
_VALIDATION_SEED = 0


@dataclass(frozen=True)
class MicroBatch:
    tokens: Tensor  # [b, s] int64
    labels: Tensor  # [b, s] int64, tokens shifted by one
    loss_mask: Tensor | None = None  # [b, s] fp32, 1 where a label counts; None: everywhere


@dataclass(frozen=True)
class Samples:
    """Training samples of a run, by position."""

    segment: Segment
    datasets: tuple[WindowDataset, ...]
    """One for each source of the segment."""

    def windows_at(self, positions: NDArray[np.int64]) -> list[Window]:
        """Windows that the samples at `positions` [n] read."""
        numbers, windows = self.segment.windows_at(positions)
        return [
            Window(self.datasets[number], window)
            for number, window in zip(numbers.tolist(), windows.tolist(), strict=True)
        ]

    def read(self, positions: NDArray[np.int64]) -> NDArray[np.integer[Any]]:
        """Token ids [n, s + 1] of the samples at `positions` [n]."""
        return read_windows(self.windows_at(positions))


class MicroBatches:
    """Endless micro-batches of this rank, from global position `start_sample` on.

    The labels that follow `masked_token` do not count in the loss. `pin` copies a tensor to pinned memory. A
    thread reads `prefetch` micro-batches ahead; `next` raises its errors. Close it, or use it in a `with`
    block, to end the thread.
    """

    # Each rank of a tensor-parallel group reads the same windows for itself: 4 kB a sequence from the page
    # cache of the node are cheaper than a broadcast.

    def __init__(
        self,
        samples: Samples,
        *,
        micro_batch_size: int,
        dp_rank: int = 0,
        dp_size: int = 1,
        start_sample: int = 0,
        prefetch: int = 4,
        masked_token: int | None = None,
        pin: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    ) -> None:
        self._samples = samples
        self._masked_token = masked_token
        self._pin = pin
        self._micro_batch_size = micro_batch_size
        self._dp_rank = dp_rank
        self._dp_size = dp_size
        self._prefetch = prefetch
        self._batches = _read_ahead(self._read(start_sample), prefetch)

    def __iter__(self) -> "MicroBatches":
        return self

    def __next__(self) -> MicroBatch:
        with record_function("read"):  # a name in traces
            return next(self._batches)

    def __enter__(self) -> "MicroBatches":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._batches.close()

    def seek(self, sample: int) -> None:
        """Go on from global position `sample`."""
        self._batches.close()
        self._batches = _read_ahead(self._read(sample), self._prefetch)

    def _read(self, start_sample: int) -> Iterator[MicroBatch]:
        size = self._micro_batch_size
        at_once = max(1, SAMPLES_PLANNED_AT_ONCE // (size * self._dp_size))
        for first in count(step=at_once):
            positions = [
                _positions(number, size, self._dp_rank, self._dp_size)
                for number in range(first, first + at_once)
            ]
            windows = self._samples.windows_at(np.concatenate(positions) + start_sample)
            for row in range(0, len(windows), size):
                yield micro_batch(read_windows(windows[row : row + size]), self._masked_token, self._pin)


def validation_windows(wanted: int | None, num_windows: int) -> NDArray[np.int64]:
    """Windows of a validation set that an evaluation reads, ascending: all, or `wanted` drawn from them.

    The draw is always the same, and a larger one contains the smaller.
    """
    # Drawn, since a set is often several files in a row: its first windows are of one kind of text.
    if wanted is None or wanted >= num_windows:
        return np.arange(num_windows, dtype=np.int64)
    return np.sort(windows_at(np.arange(wanted, dtype=np.int64), num_windows, _VALIDATION_SEED))


def eval_batches(
    dataset: WindowDataset,
    windows: NDArray[np.int64],
    *,
    micro_batch_size: int,
    dp_rank: int = 0,
    dp_size: int = 1,
    masked_token: int | None = None,
) -> Iterator[MicroBatch]:
    """Micro-batches of this rank's share of the windows.

    Every rank gets the same number of them: the last ones are filled up with rows that do not count.
    """
    for number in range(-(-len(windows) // (micro_batch_size * dp_size))):
        positions = _positions(number, micro_batch_size, dp_rank, dp_size)
        missing = positions >= len(windows)
        batch = micro_batch(dataset.read(windows[np.where(missing, 0, positions)]), masked_token)
        if missing.any():
            mask = torch.ones(batch.labels.shape) if batch.loss_mask is None else batch.loss_mask
            mask[torch.from_numpy(missing)] = 0
            batch = MicroBatch(batch.tokens, batch.labels, mask)
        yield batch


def _positions(number: int, micro_batch_size: int, dp_rank: int, dp_size: int) -> NDArray[np.int64]:
    """Positions of a rank's micro-batch `number`, both counted from the first one."""
    first = (number * dp_size + dp_rank) * micro_batch_size
    return np.arange(first, first + micro_batch_size, dtype=np.int64)


def micro_batch(
    ids: NDArray[np.integer[Any]],
    masked_token: int | None = None,
    pin: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> MicroBatch:
    """Micro-batch of token ids [b, s + 1]; the labels that follow `masked_token` do not count."""
    inputs, following = ids[:, :-1], ids[:, 1:]
    mask = None if masked_token is None else (inputs != masked_token).astype(np.float32)
    return MicroBatch(
        tokens=pin(torch.from_numpy(inputs.astype(np.int64))),
        labels=pin(torch.from_numpy(following.astype(np.int64))),
        loss_mask=None if mask is None else pin(torch.from_numpy(mask)),
    )


def _read_ahead(source: Iterator[MicroBatch], depth: int) -> Generator[MicroBatch, None, None]:
    """Yield micro-batches that a thread reads from `source`, at most `depth` ahead, until closed."""
    ready: SimpleQueue[MicroBatch | Exception] = SimpleQueue()
    room: SimpleQueue[None] = SimpleQueue()  # an entry for each micro-batch that may be read beside the next
    stopped = threading.Event()

    def read() -> None:
        try:
            for batch in source:
                ready.put(batch)
                room.get()
                if stopped.is_set():
                    return
        except Exception as error:
            ready.put(error)

    thread = threading.Thread(target=read, name="read-ahead", daemon=True)
    thread.start()
    try:
        for _ in range(depth - 1):
            room.put(None)
        while True:
            item = ready.get()
            if isinstance(item, Exception):
                raise item
            room.put(None)
            yield item
    finally:
        stopped.set()
        room.put(None)
        thread.join()
