from pathlib import Path

import numpy as np
import pytest

from llama_mcore.data.dataset import WindowDataset
from llama_mcore.data.manifest import build_manifest, write_manifest
from llama_mcore.errors import DataError
from tests.data.test_indexed import write


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    """The tokens 0, 1, ... 12 in three documents."""
    write(tmp_path / "d", [list(range(5)), list(range(5, 6)), list(range(6, 13))])
    return tmp_path / "d"


def read(dataset: WindowDataset, *windows: int) -> list[list[int]]:
    return dataset.read(np.array(windows, dtype=np.int64)).tolist()


def test_windows_cover_the_stream_across_documents(prefix: Path) -> None:
    dataset = WindowDataset(prefix, seq_length=4)
    assert dataset.num_windows == 3
    assert read(dataset, 1, 0) == [[4, 5, 6, 7, 8], [0, 1, 2, 3, 4]]
    assert dataset.read(np.array([0])).dtype == np.int64
    assert [label for row in read(dataset, 0, 1, 2) for label in row[1:]] == list(range(1, 13))


@pytest.mark.parametrize(("seq_length", "num_windows"), [(3, 4), (5, 2), (6, 2), (7, 1), (12, 1)])
def test_a_last_window_needs_its_last_label(prefix: Path, seq_length: int, num_windows: int) -> None:
    dataset = WindowDataset(prefix, seq_length)
    assert dataset.num_windows == num_windows
    assert len(read(dataset, num_windows - 1)[0]) == seq_length + 1
    for outside in (num_windows, -1):
        with pytest.raises(IndexError):
            read(dataset, outside)


def test_parts_are_one_source_whose_windows_stay_inside_them(prefix: Path, tmp_path: Path) -> None:
    write(tmp_path / "short", [[90, 91]])
    write(tmp_path / "other", [list(range(50, 60))])
    dataset = WindowDataset([prefix, tmp_path / "short", tmp_path / "other"], seq_length=4)
    assert dataset.num_windows == 3 + 0 + 2
    assert [row[0] for row in read(dataset, 0, 1, 2, 3, 4)] == [0, 4, 8, 50, 54]
    assert dataset.content_id != WindowDataset([tmp_path / "other", prefix], seq_length=4).content_id
    assert WindowDataset([prefix], 4).content_id == WindowDataset(prefix, 4).content_id


def test_dataset_shorter_than_one_window(prefix: Path) -> None:
    with pytest.raises(DataError, match=r"holds 13 tokens; one window needs model.seq_length \+ 1 = 14"):
        WindowDataset(prefix, seq_length=13)


def test_ids_outside_the_vocabulary_are_refused_where_they_are(prefix: Path, tmp_path: Path) -> None:
    dataset = WindowDataset(prefix, seq_length=4, vocab_size=8)
    assert read(dataset, 0) == [[0, 1, 2, 3, 4]]
    with pytest.raises(DataError, match=r"token id 8 in window 1; model\.vocab_size = 8"):
        read(dataset, 0, 1)
    write(tmp_path / "negative", [[3, -1, 4]], np.int32)
    with pytest.raises(DataError, match="token id -1 in window 0"):
        read(WindowDataset(tmp_path / "negative", seq_length=2, vocab_size=8), 0)


def test_a_larger_vocabulary_is_refused_at_once(prefix: Path) -> None:
    write_manifest(prefix, build_manifest(prefix, vocab_size=64, text_bytes=39))
    assert WindowDataset(prefix, seq_length=4, vocab_size=64).bytes_per_token == 3
    with pytest.raises(DataError, match=r"made with 64 tokens; model\.vocab_size = 32"):
        WindowDataset(prefix, seq_length=4, vocab_size=32)
