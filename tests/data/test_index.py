"""llama_mcore.data.index: an index is refused unless it agrees with itself and with the size of the .bin."""

import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from llama_mcore.data import index as index_module
from llama_mcore.data.index import HEADER, Index, write_index
from llama_mcore.errors import DataError
from tests.data.test_indexed_dataset import DOCUMENTS, write
from tests.support.errors import refused

MAGIC = b"MMIDIDX\x00\x00"


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    """Three documents of 3, 1 and 4 tokens: an index of 34 + 12 + 24 + 32 bytes."""
    write(tmp_path / "d", DOCUMENTS)
    return tmp_path / "d"


def put(prefix: Path, offset: int, data: bytes) -> None:
    with Path(f"{prefix}.idx").open("r+b") as stream:
        stream.seek(offset)
        stream.write(data)


def test_every_truncation_is_refused(prefix: Path) -> None:
    for suffix in (".bin", ".idx"):
        path = Path(f"{prefix}{suffix}")
        whole = path.read_bytes()
        for data in (*(whole[:length] for length in range(len(whole))), whole + b"\0"):
            path.write_bytes(data)
            with pytest.raises(DataError):
                Index(prefix)
        path.write_bytes(whole)


def test_every_flipped_bit_is_refused(prefix: Path) -> None:
    """All but the borders of documents, which nothing else in the two files confirms: see the manifest."""
    path = Path(f"{prefix}.idx")
    whole = path.read_bytes()
    inner_documents = range(len(whole) - 3 * 8, len(whole) - 8)
    for position in set(range(len(whole))) - set(inner_documents):
        for bit in range(8):
            damaged = bytearray(whole)
            damaged[position] ^= 1 << bit
            path.write_bytes(damaged)
            with pytest.raises(DataError):
                Index(prefix)


@settings(max_examples=300, deadline=None)
@given(position=st.integers(0, 101), value=st.integers(0, 255))
def test_a_changed_byte_is_refused_or_changes_no_token(
    tmp_path_factory: pytest.TempPathFactory, position: int, value: int
) -> None:
    prefix = tmp_path_factory.mktemp("index") / "d"
    write(prefix, DOCUMENTS)
    put(prefix, position, bytes([value]))
    try:
        index = Index(prefix)
    except DataError:
        return
    assert index.tokens()[:].tolist() == [5, 6, 7, 8, 9, 10, 11, 12]
    assert sum(lengths.sum() for lengths in index.document_lengths()) == 8


# Where which bytes are put, the file that is named, and what of them a reader has to be told.
DAMAGE = [
    (0, b"X", ".idx", ""),
    (9, struct.pack("<Q", 2), ".idx", "version 2"),
    (17, b"\x04", ".idx", "sequence 0"),
    (17, b"\x06", ".idx", "dtype code 6"),
    (18, struct.pack("<Q", 1 << 62), ".idx", "102 bytes"),
    (26, struct.pack("<Q", 1 << 62), ".idx", "102 bytes"),
    (34, struct.pack("<i", 2), ".idx", "sequence 0"),
    (34, struct.pack("<i", -3), ".idx", "sequence 0"),
    (34 + 8, struct.pack("<i", 5), ".bin", "at least 18"),
    (34 + 8, struct.pack("<i", 3), ".bin", "14"),
    (34 + 12 + 8, struct.pack("<q", 10), ".idx", "sequence 0"),
    (70, struct.pack("<q", 1), ".idx", "documents"),
    (70 + 24, struct.pack("<q", 2), ".idx", "documents"),
    (70 + 8, struct.pack("<qq", 2, 1), ".idx", "documents"),
    (70 + 8, struct.pack("<q", 1 << 62), ".idx", "documents"),
    (70 + 8, struct.pack("<q", -1), ".idx", "documents"),
    (34, struct.pack("<iii", 9, -5, 4) + struct.pack("<qqq", 0, 18, 8), ".idx", "sequence 0"),
]


@pytest.mark.parametrize(("offset", "data", "suffix", "told"), DAMAGE)
def test_damage_is_named(prefix: Path, offset: int, data: bytes, suffix: str, told: str) -> None:
    put(prefix, offset, data)
    with refused(DataError, "dataset", f"{prefix}{suffix}") as error:
        Index(prefix)
    assert told in error.value.problems[0].reason


def test_the_sums_stop_at_the_end_of_the_bin(prefix: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lengths that the .bin cannot hold are not added up until they leave 64 bits."""
    monkeypatch.setattr(index_module, "CHUNK", 1)
    Path(f"{prefix}.bin").write_bytes(b"\0\0")
    with refused(DataError, "dataset", f"{prefix}.bin") as error:
        Index(prefix)
    assert "at least 6" in error.value.problems[0].reason


@pytest.mark.parametrize("documents", [0, 1])
def test_no_documents(tmp_path: Path, documents: int) -> None:
    (tmp_path / "d.bin").touch()
    tables = np.zeros(documents, np.int64).tobytes()
    (tmp_path / "d.idx").write_bytes(HEADER.pack(MAGIC, 1, 8, 0, documents) + tables)
    with refused(DataError, "dataset", tmp_path / "d.idx"):
        Index(tmp_path / "d")


def test_documents_without_tokens(tmp_path: Path) -> None:
    write(tmp_path / "d", [[]])
    with refused(DataError, "dataset", tmp_path / "d.bin"):
        Index(tmp_path / "d")


@pytest.mark.parametrize("chunk", [1, 2, 1 << 20])
def test_documents_of_several_sequences_or_none(
    tmp_path: Path, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_module, "CHUNK", chunk)
    builder = IndexedDatasetBuilder(str(tmp_path / "d.bin"), dtype=np.int32)
    for lengths in ([2, 3], [], [4], []):
        builder.add_document(np.arange(sum(lengths)), lengths)
    builder.finalize(str(tmp_path / "d.idx"))
    index = Index(tmp_path / "d")
    assert (index.num_documents, index.num_tokens) == (4, 9)
    assert np.concatenate(list(index.document_lengths())).tolist() == [5, 0, 4, 0]
    assert [index.document_of(token) for token in range(9)] == [0] * 5 + [2] * 4
    assert index.document_starts(1, 5).tolist() == [5, 5, 9, 9]


def test_tokens_and_documents_beyond_32_bits(tmp_path: Path) -> None:
    """Five documents of 2**31 - 1 tokens: 20 GiB, none of which takes space."""
    longest = (1 << 31) - 1
    write_index(
        tmp_path / "d.idx", np.uint16, 5, lambda: [np.full(2, longest, np.int32), np.full(3, longest)]
    )
    with (tmp_path / "d.bin").open("wb") as stream:
        stream.truncate(5 * longest * 2)
        stream.seek(5 * longest * 2 - 2)
        stream.write(np.array([321], np.uint16).tobytes())
    index = Index(tmp_path / "d")
    assert index.num_tokens == 5 * longest > 1 << 33
    assert index.document_starts(4, 6).tolist() == [4 * longest, 5 * longest]
    assert index.document_of(4 * longest - 1) == 3
    assert index.tokens()[-2:].tolist() == [0, 321]


def test_more_documents_than_32_bits_can_count(tmp_path: Path) -> None:
    """The end of an index of 2**32 documents; the rest of it is a hole, so its check is left out."""
    index = Index.__new__(Index)
    index.prefix, index.dtype = str(tmp_path / "d"), np.uint16
    index.num_sequences = index.num_documents = count = 1 << 32
    index.num_bytes = (1 << 43) + 6
    with (tmp_path / "d.idx").open("wb") as stream:
        stream.truncate(HEADER.size + 20 * count + 8)
        stream.seek(HEADER.size + 12 * count - 16)
        stream.write(np.array([1 << 42, 1 << 43], np.int64).tobytes())
        stream.seek(HEADER.size + 20 * count - 16)
        stream.write(np.array([count - 2, count - 1, count], np.int64).tobytes())
    assert index.document_starts(count - 2, count + 1).tolist() == [1 << 41, 1 << 42, (1 << 42) + 3]
