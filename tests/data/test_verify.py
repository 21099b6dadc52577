"""llama_mcore.data.verify: damage that is seen at open, and damage that only reading all finds."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_mcore.data import verify
from llama_mcore.data.index import Index
from llama_mcore.data.indexed_dataset import IndexedDataset
from llama_mcore.data.manifest import DatasetManifest, build_manifest, write_manifest
from llama_mcore.data.verify import Damage, count_problems, damaged_blocks, index_problems, open_problems
from llama_mcore.errors import DataError
from tests.data.test_indexed_dataset import DOCUMENTS, write
from tests.support.errors import refused

LONG = [list(range(5)), list(range(5, 6)), list(range(6, 20))]  # 20 tokens, five blocks of 8 bytes


def make(prefix: Path, documents: list[list[int]]) -> DatasetManifest:
    write(prefix, documents)
    manifest = build_manifest(prefix, block_bytes=8)
    write_manifest(prefix, manifest)
    return manifest


def change(path: Path, position: int, value: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= value
    path.write_bytes(data)


def test_a_flipped_bit_in_any_byte_of_the_index_is_refused(tmp_path: Path) -> None:
    make(tmp_path / "d", DOCUMENTS)
    path = tmp_path / "d.idx"
    for position in range(path.stat().st_size):
        bit = 1 << position % 8
        change(path, position, bit)
        with pytest.raises(DataError):
            IndexedDataset(tmp_path / "d")
        change(path, position, bit)
    assert IndexedDataset(tmp_path / "d").num_documents == 3


@settings(max_examples=200, deadline=None)
@given(
    changes=st.dictionaries(st.integers(0, 101), st.integers(1, 255), min_size=1, max_size=4),
    documents=st.permutations(DOCUMENTS),
)
def test_every_changed_index_is_refused(
    tmp_path_factory: pytest.TempPathFactory, changes: dict[int, int], documents: list[list[int]]
) -> None:
    prefix = tmp_path_factory.mktemp("verify") / "d"
    make(prefix, documents)
    for position, value in changes.items():
        change(Path(f"{prefix}.idx"), position, value)
    with pytest.raises(DataError):
        IndexedDataset(prefix)


@pytest.mark.parametrize("swapped", [".bin", ".idx", ".json"])
def test_files_of_two_builds_are_refused(tmp_path: Path, swapped: str) -> None:
    """The same counts and sizes: nothing but the manifest tells the builds apart."""
    make(tmp_path / "a", [[5, 6, 7], [8, 9]])
    make(tmp_path / "b", [[1, 2], [3, 4, 5]])
    (tmp_path / f"b{swapped}").replace(tmp_path / f"a{swapped}")
    with refused(DataError, "dataset"):
        IndexedDataset(tmp_path / "a")


def test_all_counts_that_differ_are_named(tmp_path: Path) -> None:
    manifest = make(tmp_path / "d", DOCUMENTS)
    write(tmp_path / "d", [[1], [2]], np.int32)
    names = [problem.field.rpartition(" ")[2] for problem in count_problems(manifest, Index(tmp_path / "d"))]
    assert names == ["dtype", "documents", "tokens", "blocks"]


@pytest.mark.parametrize(("block", "at_open"), [(0, True), (2, False), (4, True)])
def test_the_first_and_the_last_block_are_read_at_open(tmp_path: Path, block: int, at_open: bool) -> None:
    manifest = make(tmp_path / "d", LONG)
    change(tmp_path / "d.bin", 8 * block + 3, 1)
    index = Index(tmp_path / "d")
    assert bool(open_problems(manifest, index)) == at_open
    assert [each.block for each in damaged_blocks(manifest, index)] == [block]


def test_every_flipped_bit_of_the_tokens_is_found(tmp_path: Path) -> None:
    manifest = make(tmp_path / "d", LONG)
    index, path = Index(tmp_path / "d"), tmp_path / "d.bin"
    assert list(damaged_blocks(manifest, index)) == []
    for position in range(40):
        for bit in range(8):
            change(path, position, 1 << bit)
            assert [each.block for each in damaged_blocks(manifest, index)] == [position // 8]
            change(path, position, 1 << bit)


def test_damage_says_which_bytes_and_documents(tmp_path: Path) -> None:
    manifest = make(tmp_path / "d", LONG)
    change(tmp_path / "d.bin", 8, 1)
    change(tmp_path / "d.bin", 39, 0x80)
    read: list[int] = []
    index = Index(tmp_path / "d")
    damage = list(damaged_blocks(manifest, index, vocab_size=19, advance=read.append))
    reasons = [each.reason for each in damage]
    assert damage == [Damage(1, 8, 16, 0, 2, reasons[0]), Damage(4, 32, 40, 2, 2, reasons[1])]
    assert ["vocabulary of 19" in reason for reason in reasons] == [False, True]
    assert read == [8] * 5
    told = str(damage[0].problem(index))
    assert all(part in told for part in ("block 1 ", "bytes 8 to 15", "documents 0 to 2"))


def test_ids_outside_the_vocabulary_are_found_without_a_manifest(tmp_path: Path) -> None:
    write(tmp_path / "d", LONG)
    index = Index(tmp_path / "d")
    assert list(damaged_blocks(None, index)) == []
    (damage,) = damaged_blocks(None, index, vocab_size=18)
    assert "2 token ids outside the vocabulary of 18" in damage.reason


def test_a_long_index_is_hashed_by_verify_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = make(tmp_path / "d", DOCUMENTS)
    path = tmp_path / "d.idx"
    change(path, path.stat().st_size - 16, 1)
    index = Index(tmp_path / "d")
    monkeypatch.setattr(verify, "HASHED_INDEX_BYTES", path.stat().st_size)
    assert open_problems(manifest, index)
    monkeypatch.setattr(verify, "HASHED_INDEX_BYTES", path.stat().st_size - 1)
    assert not open_problems(manifest, index)
    assert index_problems(manifest, index)
