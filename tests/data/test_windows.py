import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_mcore.data.manifest import build_manifest, write_manifest
from llama_mcore.data.windows import ConcatenatedWindows, Window, WindowDataset, read_windows
from llama_mcore.errors import DataError
from tests.data.test_indexed_dataset import write
from tests.support.errors import refused


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    """The tokens 0, 1, ... 12 in three documents."""
    write(tmp_path / "d", [list(range(5)), list(range(5, 6)), list(range(6, 13))])
    return tmp_path / "d"


def read(dataset: WindowDataset, *windows: int) -> list[list[int]]:
    return dataset.read(windows).tolist()


def test_windows_cover_the_stream_across_documents(prefix: Path) -> None:
    dataset = WindowDataset(prefix, seq_length=4)
    assert dataset.num_windows == 3
    assert read(dataset, 1, 0) == [[4, 5, 6, 7, 8], [0, 1, 2, 3, 4]]
    assert dataset.read([0]).dtype == np.uint16
    assert [label for row in read(dataset, 0, 1, 2) for label in row[1:]] == list(range(1, 13))


@pytest.mark.parametrize(("seq_length", "num_windows"), [(3, 4), (5, 2), (6, 2), (7, 1), (12, 1)])
def test_a_last_window_needs_its_last_label(prefix: Path, seq_length: int, num_windows: int) -> None:
    dataset = WindowDataset(prefix, seq_length)
    assert dataset.num_windows == num_windows
    assert len(read(dataset, num_windows - 1)[0]) == seq_length + 1
    for outside in (num_windows, -1):
        with pytest.raises(IndexError):
            read(dataset, outside)


def test_windows_of_several_datasets_stay_inside_each(prefix: Path, tmp_path: Path) -> None:
    write(tmp_path / "short", [[90, 91]])
    write(tmp_path / "other", [list(range(50, 60))])
    dataset = WindowDataset([prefix, tmp_path / "short", tmp_path / "other"], seq_length=4)
    assert dataset.num_windows == 3 + 0 + 2
    assert [row[0] for row in read(dataset, 0, 1, 2, 3, 4)] == [0, 4, 8, 50, 54]
    assert dataset.content_id != WindowDataset([tmp_path / "other", prefix], seq_length=4).content_id
    assert WindowDataset([prefix], 4).content_id == WindowDataset(prefix, 4).content_id


def test_dataset_shorter_than_one_window(prefix: Path) -> None:
    with refused(DataError, "dataset", prefix) as error:
        WindowDataset(prefix, seq_length=13)
    assert "13 tokens" in str(error.value)
    assert "model.seq_length + 1 = 14" in str(error.value)


def test_ids_outside_the_vocabulary_are_refused_where_they_are(prefix: Path, tmp_path: Path) -> None:
    dataset = WindowDataset(prefix, seq_length=4, vocab_size=8)
    assert read(dataset, 0) == [[0, 1, 2, 3, 4]]
    with refused(DataError, "dataset", prefix) as error:
        read(dataset, 0, 1)
    assert "token id 8 in window 1; model.vocab_size = 8" in str(error.value)
    write(tmp_path / "negative", [[3, -1, 4]], np.int32)
    with pytest.raises(DataError, match="token id -1 in window 0"):
        read(WindowDataset(tmp_path / "negative", seq_length=2, vocab_size=8), 0)


def test_a_larger_vocabulary_is_refused_at_once(prefix: Path) -> None:
    write_manifest(prefix, build_manifest(prefix, vocab_size=64, text_bytes=39))
    assert WindowDataset(prefix, seq_length=4, vocab_size=64).bytes_per_token == 3
    with refused(DataError, "dataset", prefix) as error:
        WindowDataset(prefix, seq_length=4, vocab_size=32)
    assert "vocabulary of 64; model.vocab_size = 32" in str(error.value)


DTYPES = [np.uint8, np.uint16, np.int32, np.int64]
PARTS = st.lists(
    st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 255), min_size=1, max_size=30)),
    min_size=1,
    max_size=4,
)


@settings(max_examples=40, deadline=None)
@given(parts=PARTS, seq_length=st.integers(1, 8), vocab_size=st.integers(1, 256) | st.none(), data=st.data())
def test_windows_are_slices_of_their_datasets(
    tmp_path_factory: pytest.TempPathFactory,
    parts: list[tuple[type[np.integer], list[int]]],
    seq_length: int,
    vocab_size: int | None,
    data: st.DataObject,
) -> None:
    """Against slices of the lists themselves, whatever dtypes the parts have."""
    slices = [
        ids[start : start + seq_length + 1]
        for _, ids in parts
        for start in range(0, len(ids) - seq_length, seq_length)
    ]
    folder = tmp_path_factory.mktemp("parts")
    for number, (dtype, ids) in enumerate(parts):
        write(folder / str(number), [ids], dtype)
    prefixes = [folder / str(number) for number in range(len(parts))]
    if not slices:
        with refused(DataError, "dataset"):
            WindowDataset(prefixes, seq_length, vocab_size)
        return
    dataset = WindowDataset(prefixes, seq_length, vocab_size)
    assert dataset.num_windows == len(slices)
    windows = data.draw(st.lists(st.integers(0, len(slices) - 1), min_size=1, max_size=9))
    outside = [
        (token, window)
        for window in windows
        for token in slices[window]
        if vocab_size is not None and token >= vocab_size
    ]
    if outside:
        token, window = outside[0]
        with pytest.raises(DataError, match=rf"token id {token} in window {window};"):
            dataset.read(windows)
    else:
        assert read(dataset, *windows) == [slices[window] for window in windows]


def test_datasets_of_any_dtype_and_vocabulary_share_a_batch(prefix: Path, tmp_path: Path) -> None:
    write(tmp_path / "wide", [[70_000, 70_001, 70_002]], np.int32)
    small = WindowDataset(prefix, 2, vocab_size=13)
    wide, unchecked = (WindowDataset(tmp_path / "wide", 2, size) for size in (80_000, None))
    for other in (wide, unchecked):
        ids = read_windows([Window(small, 1), Window(other, 0)])
        assert ids.tolist() == [[2, 3, 4], [70_000, 70_001, 70_002]]
    with refused(DataError, "dataset", prefix) as error:
        read_windows([Window(wide, 0), Window(WindowDataset(prefix, 2, vocab_size=5), 2)])
    assert "token id 5 in window 2; model.vocab_size = 5" in str(error.value)


def test_a_file_cut_short_after_it_was_opened(prefix: Path) -> None:
    dataset = WindowDataset(prefix, seq_length=4)
    os.truncate(f"{prefix}.bin", 2 * 12)
    assert read(dataset, 1) == [[4, 5, 6, 7, 8]]
    with refused(DataError, "dataset", f"{prefix}.bin") as error:
        read(dataset, 0, 2)
    assert "byte 26" in str(error.value)


def test_windows_are_numbered_through_a_thousand_datasets() -> None:
    windows = [0, 3, 0, 0, 1] * 200
    parts = ConcatenatedWindows(windows)
    assert parts.num_windows == 800
    expected = [(part, number) for part, count in enumerate(windows) for number in range(count)]
    assert [parts.locate(window) for window in range(800)] == expected
    for outside in (-1, 800):
        with pytest.raises(IndexError, match=rf"window {outside} of 800"):
            parts.locate(outside)
