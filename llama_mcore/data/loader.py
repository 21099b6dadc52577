"""Micro-batches of one data-parallel rank.

Sample k of step n has the global position n * global_batch_size + k whatever the layout; layouts differ only
in which rank and micro-batch reads it. So the samples of a step do not depend on dp or micro_batch_size.
"""

import threading
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from itertools import count
from queue import Full, Queue
from types import TracebackType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llama_mcore.data.dataset import WindowDataset
from llama_mcore.data.order import windows_at
from llama_mcore.errors import DataError, Problem

_POLL_SECONDS = 0.1


@dataclass(frozen=True)
class MicroBatch:
    tokens: Tensor  # [b, s] int64
    labels: Tensor  # [b, s] int64, tokens shifted by one


class MicroBatches:
    """Endless micro-batches of this rank, from global position `start_sample` on.

    A thread reads `prefetch` of them ahead; what goes wrong there is raised by `next`. Close it, or use it in
    a `with` block, to end the thread.
    """

    def __init__(
        self,
        dataset: WindowDataset,
        *,
        seed: int,
        micro_batch_size: int,
        dp_rank: int = 0,
        dp_size: int = 1,
        start_sample: int = 0,
        prefetch: int = 4,
    ) -> None:
        self._dataset = dataset
        self._seed = seed
        self._micro_batch_size = micro_batch_size
        self._dp_rank = dp_rank
        self._dp_size = dp_size
        self._start_sample = start_sample
        self._batches = _read_ahead(self._read(), prefetch)

    def __iter__(self) -> "MicroBatches":
        return self

    def __next__(self) -> MicroBatch:
        return next(self._batches)

    def __enter__(self) -> "MicroBatches":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._batches.close()

    def _read(self) -> Iterator[MicroBatch]:
        for number in count():
            positions = _positions(number, self._micro_batch_size, self._dp_rank, self._dp_size)
            positions += self._start_sample
            yield _collate(self._dataset, windows_at(positions, self._dataset.num_windows, self._seed))


def eval_batches(
    dataset: WindowDataset,
    *,
    micro_batch_size: int,
    global_batch_size: int,
    num_batches: int,
    dp_rank: int = 0,
    dp_size: int = 1,
) -> Iterator[MicroBatch]:
    """This rank's share of the first `num_batches` global batches of windows, or of as many as there are.

    The windows are the same at every evaluation and under every layout, and every rank gets the same number
    of micro-batches. `global_batch_size` is divisible by micro_batch_size * dp_size.
    """
    available = min(num_batches, dataset.num_windows // global_batch_size)
    if not available:
        bound = f"holds {dataset.num_windows:,} windows; one evaluation batch needs {global_batch_size:,}"
        remedy = "give more held-out text or a smaller train.global_batch_size"
        raise DataError(Problem("dataset", dataset.prefix, bound, remedy))
    micro_batches = available * global_batch_size // (micro_batch_size * dp_size)
    windows = (_positions(number, micro_batch_size, dp_rank, dp_size) for number in range(micro_batches))
    return (_collate(dataset, positions) for positions in windows)


def _positions(number: int, micro_batch_size: int, dp_rank: int, dp_size: int) -> NDArray[np.int64]:
    """Positions that a rank's micro-batch `number` reads, both counted from the first one."""
    first = (number * dp_size + dp_rank) * micro_batch_size
    return np.arange(first, first + micro_batch_size, dtype=np.int64)


def _collate(dataset: WindowDataset, windows: NDArray[np.int64]) -> MicroBatch:
    tokens, labels = zip(*(dataset[int(window)] for window in windows), strict=True)
    return MicroBatch(torch.from_numpy(np.stack(tokens)), torch.from_numpy(np.stack(labels)))


def _read_ahead(source: Iterator[MicroBatch], depth: int) -> Generator[MicroBatch, None, None]:
    """Yield what a thread reads from `source`, at most `depth` ahead; closing it ends the thread."""
    ready: Queue[MicroBatch | Exception] = Queue(depth)
    stopped = threading.Event()

    def put(item: MicroBatch | Exception) -> None:
        while not stopped.is_set():
            try:
                return ready.put(item, timeout=_POLL_SECONDS)
            except Full:
                continue

    def read() -> None:
        try:
            for batch in source:
                put(batch)
                if stopped.is_set():
                    return
        except Exception as error:
            put(error)

    thread = threading.Thread(target=read, name="read-ahead", daemon=True)
    thread.start()
    try:
        while True:
            item = ready.get()
            if isinstance(item, Exception):
                raise item
            yield item
    finally:
        stopped.set()
        thread.join()
