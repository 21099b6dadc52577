import threading
from itertools import islice

import pytest
import torch

from llama_mcore.data.dataset import WindowDataset
from llama_mcore.data.loader import MicroBatch, MicroBatches, eval_batches
from llama_mcore.data.order import window_at
from llama_mcore.errors import DataError
from tests.data.test_indexed import write

NUM_WINDOWS = 37
SEQ_LENGTH = 2


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> WindowDataset:
    """37 windows; the first token of window w is 2 w."""
    prefix = tmp_path_factory.mktemp("loader") / "d"
    write(prefix, [list(range(NUM_WINDOWS * SEQ_LENGTH + 1))])
    return WindowDataset(prefix, SEQ_LENGTH)


def windows_of(batch: MicroBatch) -> list[int]:
    return (batch.tokens[:, 0] // SEQ_LENGTH).tolist()


def step(dataset: WindowDataset, number: int, micro_batch_size: int, accumulation: int, dp: int) -> list[int]:
    """The windows that all ranks read in one step."""
    windows = []
    for rank in range(dp):
        with MicroBatches(
            dataset,
            seed=5,
            micro_batch_size=micro_batch_size,
            dp_rank=rank,
            dp_size=dp,
            start_sample=number * 12,
        ) as batches:
            for batch in islice(batches, accumulation):
                assert batch.tokens.shape == batch.labels.shape == (micro_batch_size, SEQ_LENGTH)
                assert batch.tokens.dtype == batch.labels.dtype == torch.int64
                assert torch.equal(batch.labels, batch.tokens + 1)
                windows += windows_of(batch)
    return windows


@pytest.mark.parametrize("number", [0, 1, 3, 1000])
def test_a_step_reads_the_same_samples_under_every_layout(dataset: WindowDataset, number: int) -> None:
    expected = sorted(window_at(number * 12 + k, NUM_WINDOWS, seed=5) for k in range(12))
    for micro_batch_size, accumulation, dp in [
        (12, 1, 1),
        (1, 12, 1),
        (3, 2, 2),
        (2, 2, 3),
        (1, 3, 4),
        (1, 1, 12),
    ]:
        assert sorted(step(dataset, number, micro_batch_size, accumulation, dp)) == expected


def test_resuming_continues_the_same_sequence(dataset: WindowDataset) -> None:
    def first(start_sample: int, count: int) -> list[list[int]]:
        with MicroBatches(dataset, seed=1, micro_batch_size=2, start_sample=start_sample) as batches:
            return [windows_of(batch) for batch in islice(batches, count)]

    assert first(0, 30)[4 * 3 :] == first(24, 30 - 4 * 3)


def test_an_epoch_reads_every_window_once(dataset: WindowDataset) -> None:
    with MicroBatches(dataset, seed=1, micro_batch_size=1) as batches:
        assert sorted(
            window for batch in islice(batches, NUM_WINDOWS) for window in windows_of(batch)
        ) == list(range(NUM_WINDOWS))


def read_ahead_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "read-ahead"]


def test_closing_ends_the_thread_even_when_its_queue_is_full(dataset: WindowDataset) -> None:
    batches = MicroBatches(dataset, seed=1, micro_batch_size=1, prefetch=1)
    next(batches)
    assert len(read_ahead_threads()) == 1
    batches.close()
    assert read_ahead_threads() == []
    with pytest.raises(StopIteration):
        next(batches)


def test_errors_of_the_thread_reach_the_consumer(dataset: WindowDataset) -> None:
    small = WindowDataset(dataset.prefix, SEQ_LENGTH, vocab_size=10)
    with (
        pytest.raises(DataError, match=r"token id \d+ in window \d+; model.vocab_size = 10"),
        MicroBatches(small, seed=1, micro_batch_size=4) as batches,
    ):
        list(islice(batches, NUM_WINDOWS))
    assert read_ahead_threads() == []


@pytest.mark.parametrize(("micro_batch_size", "dp"), [(8, 1), (1, 8), (2, 2), (4, 2)])
def test_evaluation_reads_the_first_windows_under_every_layout(
    dataset: WindowDataset, micro_batch_size: int, dp: int
) -> None:
    ranks = [
        [
            windows_of(batch)
            for batch in eval_batches(
                dataset,
                micro_batch_size=micro_batch_size,
                global_batch_size=8,
                num_batches=3,
                dp_rank=rank,
                dp_size=dp,
            )
        ]
        for rank in range(dp)
    ]
    assert {len(batches) for batches in ranks} == {3 * 8 // (micro_batch_size * dp)}
    assert sorted(w for batches in ranks for windows in batches for w in windows) == list(range(24))


def test_evaluation_takes_fewer_batches_where_there_are_fewer(dataset: WindowDataset) -> None:
    batches = eval_batches(dataset, micro_batch_size=4, global_batch_size=8, num_batches=100)
    assert len(list(batches)) == NUM_WINDOWS // 8 * 2


def test_evaluation_without_one_batch_is_refused_before_iterating(dataset: WindowDataset) -> None:
    with pytest.raises(DataError, match="holds 37 windows; one evaluation batch needs 38"):
        eval_batches(dataset, micro_batch_size=2, global_batch_size=38, num_batches=1)
