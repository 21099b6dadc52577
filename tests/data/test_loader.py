import threading
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from llama_mcore.data import loader
from llama_mcore.data.data_plan import Segment, SourcePlan
from llama_mcore.data.loader import (
    MicroBatch,
    MicroBatches,
    Samples,
    eval_batches,
    micro_batch,
    validation_windows,
)
from llama_mcore.data.windows import WindowDataset
from llama_mcore.errors import DataError
from tests.data.test_indexed_dataset import write
from tests.support.errors import refused
from tests.support.world import TIMEOUT_S

NUM_WINDOWS = 37
SEQ_LENGTH = 2


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> WindowDataset:
    """37 windows; the first token of window w is 2 w."""
    prefix = tmp_path_factory.mktemp("loader") / "d"
    write(prefix, [list(range(NUM_WINDOWS * SEQ_LENGTH + 1))])
    return WindowDataset(prefix, SEQ_LENGTH)


def samples(dataset: WindowDataset, seed: int = 1) -> Samples:
    plan = SourcePlan(name="a", content_id="", num_windows=dataset.num_windows, share=1, cap=1)
    return Samples(Segment(seed=seed, seq_length=SEQ_LENGTH, sources=(plan,)), (dataset,))


def windows_of(batch: MicroBatch) -> list[int]:
    return (batch.tokens[:, 0] // SEQ_LENGTH).tolist()


def step(dataset: WindowDataset, number: int, micro_batch_size: int, accumulation: int, dp: int) -> list[int]:
    """The windows that all ranks read in one step."""
    windows = []
    for rank in range(dp):
        with MicroBatches(
            samples(dataset, seed=5),
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
    positions = np.arange(number * 12, number * 12 + 12)
    expected = sorted(samples(dataset, seed=5).segment.windows_at(positions)[1].tolist())
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
        with MicroBatches(samples(dataset), micro_batch_size=2, start_sample=start_sample) as batches:
            return [windows_of(batch) for batch in islice(batches, count)]

    assert first(0, 30)[4 * 3 :] == first(24, 30 - 4 * 3)


def test_seeking_continues_at_another_place(dataset: WindowDataset) -> None:
    with MicroBatches(samples(dataset), micro_batch_size=2) as batches:
        sequence = [windows_of(batch) for batch in islice(batches, 15)]
        batches.seek(8)
        assert [windows_of(batch) for batch in islice(batches, 11)] == sequence[4:]
        assert len(read_ahead_threads()) == 1
    assert read_ahead_threads() == []


@pytest.mark.parametrize("at_once", [1, 7, 24])
def test_what_is_read_does_not_depend_on_how_much_is_planned_at_once(
    dataset: WindowDataset, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    def first() -> list[list[int]]:
        with MicroBatches(
            samples(dataset), micro_batch_size=3, dp_rank=1, dp_size=2, start_sample=5
        ) as batches:
            return [windows_of(batch) for batch in islice(batches, 20)]

    expected = first()
    monkeypatch.setattr(loader, "SAMPLES_PLANNED_AT_ONCE", at_once)
    assert first() == expected


@pytest.mark.parametrize("prefetch", [1, 3])
def test_prefetch_reads_so_many_ahead_and_no_more(dataset: WindowDataset, prefetch: int) -> None:
    """`pin` is called for the tokens and for the labels of each."""
    pinned = []
    with MicroBatches(
        samples(dataset),
        micro_batch_size=1,
        prefetch=prefetch,
        pin=lambda tensor: pinned.append(tensor) or tensor,
    ) as batches:
        for taken in (1, 2, 3):
            next(batches)
            deadline = time.monotonic() + TIMEOUT_S
            while len(pinned) < 2 * (taken + prefetch) and time.monotonic() < deadline:
                time.sleep(0.001)
            time.sleep(0.02)
            assert len(pinned) == 2 * (taken + prefetch)


def test_an_epoch_reads_every_window_once(dataset: WindowDataset) -> None:
    with MicroBatches(samples(dataset), micro_batch_size=1) as batches:
        assert sorted(
            window for batch in islice(batches, NUM_WINDOWS) for window in windows_of(batch)
        ) == list(range(NUM_WINDOWS))


def read_ahead_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "read-ahead"]


def test_closing_ends_the_prefetch_thread_even_when_its_queue_is_full(dataset: WindowDataset) -> None:
    batches = MicroBatches(samples(dataset), micro_batch_size=1, prefetch=1)
    next(batches)
    assert len(read_ahead_threads()) == 1
    batches.close()
    assert read_ahead_threads() == []
    with pytest.raises(StopIteration):
        next(batches)


def test_errors_of_the_prefetch_thread_reach_the_consumer(dataset: WindowDataset) -> None:
    small = WindowDataset(dataset.prefix, SEQ_LENGTH, vocab_size=10)
    with (
        refused(DataError, "dataset", dataset.prefix),
        MicroBatches(samples(small), micro_batch_size=4) as batches,
    ):
        list(islice(batches, NUM_WINDOWS))
    assert read_ahead_threads() == []


LAYOUTS = [(8, 1), (1, 8), (2, 2), (4, 3)]


@pytest.mark.parametrize(("micro_batch_size", "dp"), LAYOUTS)
@pytest.mark.parametrize("num_windows", [1, 24, NUM_WINDOWS, 1000])
def test_validation_windows_count_once_under_every_layout(
    dataset: WindowDataset, num_windows: int, micro_batch_size: int, dp: int
) -> None:
    windows = validation_windows(num_windows, NUM_WINDOWS)
    ranks = [
        list(eval_batches(dataset, windows, micro_batch_size=micro_batch_size, dp_rank=rank, dp_size=dp))
        for rank in range(dp)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    counted = [
        window
        for batches in ranks
        for batch in batches
        for window, mask in zip(windows_of(batch), counting_rows(batch), strict=True)
        if mask
    ]
    assert sorted(counted) == windows.tolist()
    assert all(batch.tokens.shape == (micro_batch_size, SEQ_LENGTH) for batches in ranks for batch in batches)


@pytest.mark.parametrize("wanted", [None, 100, 101, 1000])
def test_validation_reads_all_of_a_small_set(wanted: int | None) -> None:
    assert validation_windows(wanted, 100).tolist() == list(range(100))


def test_validation_samples_all_of_a_large_set() -> None:
    """1,000 of 100,000 windows are drawn without replacement. In each tenth lie 100 of them on average with a
    deviation below sqrt(1000 * 0.1 * 0.9) = 9.5; six of these are 57."""
    drawn = validation_windows(1000, 100_000)
    assert len(set(drawn.tolist())) == 1000
    assert drawn.tolist() == sorted(drawn.tolist())
    in_tenths = np.bincount(drawn // 10_000, minlength=10)
    assert abs(in_tenths - 100).max() < 57
    assert drawn.tolist() == validation_windows(1000, 100_000).tolist()
    assert set(validation_windows(10, 100_000).tolist()) <= set(drawn.tolist())


def counting_rows(batch: MicroBatch) -> list[bool]:
    if batch.loss_mask is None:
        return [True] * len(batch.tokens)
    assert (batch.loss_mask.amin(1) == batch.loss_mask.amax(1)).all()
    return (batch.loss_mask[:, 0] == 1).tolist()


def test_loss_mask_leaves_out_the_token_after_the_masked_one(dataset: WindowDataset) -> None:
    """Tokens are 0, 1, 2 ...: where the input is 4, the label is 5."""
    with MicroBatches(samples(dataset), micro_batch_size=NUM_WINDOWS, masked_token=4) as batches:
        batch = next(batches)
    assert batch.loss_mask is not None
    assert batch.labels[batch.loss_mask == 0].tolist() == [5]
    assert batch.loss_mask.dtype == torch.float32
    (validation,) = eval_batches(dataset, np.arange(NUM_WINDOWS), micro_batch_size=40, masked_token=4)
    assert validation.loss_mask is not None
    assert validation.loss_mask.sum() == NUM_WINDOWS * SEQ_LENGTH - 1


IDS = st.sampled_from([np.uint8, np.uint16, np.int32, np.int64]).flatmap(
    lambda dtype: arrays(dtype, array_shapes(min_dims=2, max_dims=2, min_side=2), elements=st.integers(0, 9))
)


@given(ids=IDS, masked_token=st.integers(0, 9) | st.just(70_000) | st.none())
def test_tokens_labels_and_mask_of_ids_of_any_dtype(
    ids: np.typing.NDArray[np.integer], masked_token: int | None
) -> None:
    batch = micro_batch(ids, masked_token)
    rows = ids.tolist()
    assert batch.tokens.tolist() == [row[:-1] for row in rows]
    assert batch.labels.tolist() == [row[1:] for row in rows]
    assert batch.tokens.dtype == batch.labels.dtype == torch.int64
    assert batch.tokens.is_contiguous()
    assert batch.labels.is_contiguous()
    if masked_token is None:
        assert batch.loss_mask is None
    else:
        assert batch.loss_mask is not None
        assert batch.loss_mask.dtype == torch.float32
        assert batch.loss_mask.tolist() == [[float(id != masked_token) for id in row[:-1]] for row in rows]


def test_sources_share_a_batch_in_proportion(dataset: WindowDataset, tmp_path: Path) -> None:
    write(tmp_path / "other", [list(range(1000, 1031))])
    other = WindowDataset(tmp_path / "other", SEQ_LENGTH)
    plans = tuple(
        SourcePlan(name=name, content_id="", num_windows=data.num_windows, share=share, cap=99)
        for name, data, share in (("a", dataset, 3), ("b", other, 1))
    )
    mixed = Samples(Segment(seed=1, seq_length=SEQ_LENGTH, sources=plans), (dataset, other))
    ids = mixed.read(np.arange(40))
    assert ids.shape == (40, SEQ_LENGTH + 1)
    from_other = ids[:, 0] >= 1000
    assert from_other.sum() == 10
    numbers, windows = mixed.segment.windows_at(np.arange(40))
    assert (numbers == from_other).all()
    assert (ids[:, 0] == np.where(from_other, 1000, 0) + windows * SEQ_LENGTH).all()
