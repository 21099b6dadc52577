from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
from megatron.core.datasets.indexed_dataset import IndexedDataset as MegatronDataset

from llama_mcore.data import index, indexed
from llama_mcore.data.indexed import IndexedDataset, IndexedWriter, optimal_dtype
from llama_mcore.errors import DataError, MissingInputError, OutputError

DOCUMENTS = [[5, 6, 7], [8], [9, 10, 11, 12]]


def write(prefix: Path, documents: list[list[int]], dtype: type[np.integer] = np.uint16) -> None:
    with IndexedWriter(prefix, dtype) as writer:
        for ids in documents:
            writer.add_documents(np.array(ids, dtype=dtype), np.array([len(ids)], dtype=np.int32))


@pytest.mark.parametrize("vocab_size", [32000, 65499, 65500, 128256])
def test_dtype_is_megatrons(vocab_size: int) -> None:
    assert optimal_dtype(vocab_size) == DType.optimal_dtype(vocab_size)


@settings(max_examples=25, deadline=None)
@given(
    documents=st.lists(st.lists(st.integers(0, 65535), min_size=1, max_size=9), min_size=1, max_size=12),
    dtype=st.sampled_from([np.uint16, np.int32]),
    chunk=st.integers(1, 5),
)
def test_bytes_are_megatrons(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]], dtype: type[np.integer], chunk: int
) -> None:
    """`chunk` entries of the index at a time: its pieces must join seamlessly."""
    folder = tmp_path_factory.mktemp("indexed")
    with pytest.MonkeyPatch.context() as patch:
        for module in (index, indexed):
            patch.setattr(module, "_CHUNK", chunk)
        write(folder / "ours", documents, dtype)
        dataset = IndexedDataset(folder / "ours")
    builder = IndexedDatasetBuilder(str(folder / "theirs.bin"), dtype=dtype)
    for ids in documents:
        builder.add_document(np.array(ids), [len(ids)])
    builder.finalize(str(folder / "theirs.idx"))
    for suffix in (".bin", ".idx"):
        assert (folder / f"ours{suffix}").read_bytes() == (folder / f"theirs{suffix}").read_bytes()
    assert dataset.tokens[:].tolist() == [token for ids in documents for token in ids]
    assert dataset.document_lengths.tolist() == [len(ids) for ids in documents]


def test_megatron_reads_ours(tmp_path: Path) -> None:
    write(tmp_path / "d", DOCUMENTS)
    dataset = MegatronDataset(str(tmp_path / "d"))
    assert [dataset[i].tolist() for i in range(len(dataset))] == DOCUMENTS


def test_we_read_megatrons_documents_of_several_sequences(tmp_path: Path) -> None:
    builder = IndexedDatasetBuilder(str(tmp_path / "d.bin"), dtype=np.int32)
    builder.add_document(np.arange(5), [2, 3])
    builder.add_document(np.arange(4), [4])
    builder.finalize(str(tmp_path / "d.idx"))
    dataset = IndexedDataset(tmp_path / "d")
    assert dataset.dtype is np.int32
    assert (dataset.num_tokens, dataset.num_documents) == (9, 2)
    assert dataset.document_lengths.tolist() == [5, 4]


def test_batches_of_documents_equal_single_ones(tmp_path: Path) -> None:
    write(tmp_path / "one", DOCUMENTS)
    with IndexedWriter(tmp_path / "all", np.uint16) as writer:
        writer.add_documents(np.arange(5, 13, dtype=np.uint16), np.array([3, 1, 4], dtype=np.int32))
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"one{suffix}").read_bytes() == (tmp_path / f"all{suffix}").read_bytes()


def write_and_fail(prefix: Path, error: type[BaseException]) -> None:
    with IndexedWriter(prefix, np.uint16) as writer:
        writer.add_documents(np.arange(3, dtype=np.uint16), np.array([3], dtype=np.int32))
        raise error


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_nothing_appears_after_an_error(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error):
        write_and_fail(tmp_path / "d", error)
    assert list(tmp_path.iterdir()) == []


def test_an_index_never_stands_beside_the_tokens_of_another_dataset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second of the two renames fails while an older dataset is there."""
    write(tmp_path / "d", DOCUMENTS)

    def fail_at_the_index(temporary: Path, path: Path) -> None:
        if path.suffix == ".idx":
            raise OSError(5, "Input/output error")
        temporary.replace(path)

    monkeypatch.setattr(indexed, "replace_durably", fail_at_the_index)
    with pytest.raises(OutputError, match="Input/output error"):
        write(tmp_path / "d", DOCUMENTS[::-1])
    assert [path.name for path in tmp_path.iterdir()] == ["d.bin"]


def test_an_older_dataset_stays_until_the_new_one_is_complete(tmp_path: Path) -> None:
    write(tmp_path / "d", DOCUMENTS)
    with IndexedWriter(tmp_path / "d", np.int32) as writer:
        writer.add_documents(np.array([1, 2]), np.array([2], dtype=np.int32))
        assert IndexedDataset(tmp_path / "d").num_tokens == 8
    assert IndexedDataset(tmp_path / "d").tokens[:].tolist() == [1, 2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d.bin", "d.idx"]


def test_output_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="is a file, not a folder"):
        IndexedWriter(tmp_path / "file" / "d", np.uint16)


def test_both_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError) as error:
        IndexedDataset(tmp_path / "d")
    assert [problem.value for problem in error.value.problems] == [tmp_path / "d.idx", tmp_path / "d.bin"]


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "d", DOCUMENTS)
    for suffix in (".bin", ".idx"):
        path = tmp_path / f"d{suffix}"
        whole = path.read_bytes()
        for length in range(len(whole)):
            path.write_bytes(whole[:length])
            with pytest.raises(DataError):
                IndexedDataset(tmp_path / "d")
        path.write_bytes(whole)


def test_every_flipped_bit_of_the_index_is_refused(tmp_path: Path) -> None:
    """Each bit of this index is fixed by the .bin or by the other tables."""
    write(tmp_path / "d", DOCUMENTS)
    path = tmp_path / "d.idx"
    whole = path.read_bytes()
    inner_documents = range(len(whole) - 3 * 8, len(whole) - 8)
    for position in set(range(len(whole))) - set(inner_documents):
        for bit in range(8):
            damaged = bytearray(whole)
            damaged[position] ^= 1 << bit
            path.write_bytes(damaged)
            with pytest.raises(DataError):
                IndexedDataset(tmp_path / "d")


def test_documents_out_of_order_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "d", DOCUMENTS)
    path = tmp_path / "d.idx"
    whole = path.read_bytes()
    path.write_bytes(whole[:-32] + np.array([0, 2, 1, 3]).tobytes())
    with pytest.raises(DataError, match="must list documents in order from sequence 0 to 3"):
        IndexedDataset(tmp_path / "d")


def test_negative_length_is_refused_though_all_sums_agree(tmp_path: Path) -> None:
    write(tmp_path / "d", DOCUMENTS)
    path = tmp_path / "d.idx"
    whole = path.read_bytes()
    lengths, pointers = np.array([9, -5, 4], dtype=np.int32), np.array([0, 18, 8])
    path.write_bytes(whole[:34] + lengths.tobytes() + pointers.tobytes() + whole[34 + 36 :])
    with pytest.raises(DataError, match="has a negative length"):
        IndexedDataset(tmp_path / "d")
