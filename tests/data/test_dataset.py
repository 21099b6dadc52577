from pathlib import Path

import numpy as np
import pytest

from llama_mcore.data.dataset import WindowDataset
from llama_mcore.errors import DataError
from tests.data.test_indexed import write


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    """The tokens 0, 1, ... 12 in three documents."""
    write(tmp_path / "d", [list(range(5)), list(range(5, 6)), list(range(6, 13))])
    return tmp_path / "d"


def test_windows_cover_the_stream_across_documents(prefix: Path) -> None:
    dataset = WindowDataset(prefix, seq_length=4)
    assert len(dataset) == dataset.num_windows == 3
    tokens, labels = dataset[1]
    assert (tokens.tolist(), labels.tolist()) == ([4, 5, 6, 7], [5, 6, 7, 8])
    assert tokens.dtype == labels.dtype == np.int64
    assert np.concatenate([dataset[w][1] for w in range(3)]).tolist() == list(range(1, 13))


@pytest.mark.parametrize(("seq_length", "num_windows"), [(3, 4), (5, 2), (6, 2), (7, 1), (12, 1)])
def test_a_last_window_needs_its_last_label(prefix: Path, seq_length: int, num_windows: int) -> None:
    dataset = WindowDataset(prefix, seq_length)
    assert len(dataset) == num_windows
    assert len(dataset[num_windows - 1][1]) == seq_length
    with pytest.raises(IndexError):
        dataset[num_windows]


def test_dataset_shorter_than_one_window(prefix: Path) -> None:
    with pytest.raises(DataError, match=r"holds 13 tokens; one window needs model.seq_length \+ 1 = 14"):
        WindowDataset(prefix, seq_length=13)


def test_ids_outside_the_vocabulary_are_refused_where_they_are(prefix: Path, tmp_path: Path) -> None:
    dataset = WindowDataset(prefix, seq_length=4, vocab_size=8)
    assert dataset[0][1].tolist() == [1, 2, 3, 4]
    with pytest.raises(DataError, match=r"token id 8 in window 1; model\.vocab_size = 8"):
        dataset[1]
    write(tmp_path / "negative", [[3, -1, 4]], np.int32)
    with pytest.raises(DataError, match="token id -1 in window 0"):
        WindowDataset(tmp_path / "negative", seq_length=2, vocab_size=8)[0]
