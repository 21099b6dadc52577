"""llama_mcore.data.token_file: pieces of a file that may change, shrink or vanish."""

import gc
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from llama_mcore.data.token_file import DiskArray
from llama_mcore.errors import DataError, MissingInputError
from tests.support.errors import refused

NUMBERS = np.arange(100, 200, dtype=np.uint16)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "numbers"
    path.write_bytes(b"12" + NUMBERS.tobytes())
    return path


@pytest.fixture
def array(path: Path) -> DiskArray:
    return DiskArray(path, np.uint16, 100, offset=2)


@pytest.mark.parametrize("key", [slice(0, 3), slice(-4, None), slice(90, 999), slice(5, 2), slice(None)])
def test_slices_are_numpys(array: DiskArray, key: slice) -> None:
    piece = array[key]
    assert piece.dtype == np.uint16
    assert np.array_equal(piece, NUMBERS[key])


def test_single_numbers(array: DiskArray) -> None:
    assert (len(array), array[0], array[99], array[-1]) == (100, 100, 199, 199)
    for outside in (100, -101):
        with pytest.raises(IndexError):
            array[outside]
    with pytest.raises(ValueError, match="step 2"):
        array[::2]


def test_read_into_fills_what_the_caller_owns(array: DiskArray) -> None:
    rows = np.zeros((2, 3), np.uint16)
    for row, first in zip(rows, (10, 96), strict=True):
        array.read_into(first, row)
    assert rows.tolist() == [[110, 111, 112], [196, 197, 198]]


def test_a_slice_outlives_array_and_file(path: Path) -> None:
    piece = DiskArray(path, np.uint16, 100, offset=2)[10:13]
    path.write_bytes(b"")
    gc.collect()
    assert piece.tolist() == [110, 111, 112]
    piece += 1


def test_a_file_cut_short_while_open_is_an_error_not_a_crash(path: Path, array: DiskArray) -> None:
    os.truncate(path, 2 + 2 * 50)
    assert array[49] == 149
    for key in (slice(45, 55), slice(60, 61)):
        with refused(DataError, "dataset", path):
            array[key]


def test_a_file_replaced_while_open_is_read_on_as_it_was(path: Path, array: DiskArray) -> None:
    other = path.with_name("other")
    other.write_bytes(b"")
    other.replace(path)
    assert np.array_equal(array[:], NUMBERS)


def test_a_file_that_cannot_be_opened(tmp_path: Path) -> None:
    with refused(MissingInputError, "dataset", tmp_path / "absent", remedy=False):
        DiskArray(tmp_path / "absent", np.uint8, 1)


def test_the_file_is_closed_with_the_array(path: Path) -> None:
    def opened() -> int:
        names = [Path("/proc/self/fd", number) for number in os.listdir("/proc/self/fd")]
        return sum(os.path.realpath(name) == os.path.realpath(path) for name in names)

    arrays = [DiskArray(path, np.uint16, 100, offset=2) for _ in range(20)]
    assert opened() == 20
    del arrays
    gc.collect()
    assert opened() == 0


def test_positions_beyond_32_bits(tmp_path: Path) -> None:
    path, count = tmp_path / "sparse", (1 << 32) + 5
    with path.open("wb") as stream:
        stream.truncate(8 * count)
        stream.seek(8 * (count - 2))
        stream.write(np.array([7, 1 << 40], np.int64).tobytes())
    array = DiskArray(path, np.int64, count)
    assert (len(array), array[-2], array[count - 1]) == (count, 7, 1 << 40)


def test_threads_read_at_once(array: DiskArray) -> None:
    with ThreadPoolExecutor(4) as pool:
        pieces = list(pool.map(lambda first: array[first : first + 9], [*range(90)] * 10))
    assert all(np.array_equal(piece, NUMBERS[n % 90 : n % 90 + 9]) for n, piece in enumerate(pieces))
