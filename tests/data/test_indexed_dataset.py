from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
from megatron.core.datasets.indexed_dataset import IndexedDataset as MegatronDataset

from llama_mcore.data import index, indexed_dataset
from llama_mcore.data.indexed_dataset import IndexedDataset, IndexedWriter, optimal_dtype
from llama_mcore.data.manifest import build_manifest, write_manifest
from llama_mcore.errors import DataError, MissingInputError, OutputError
from tests.support.errors import refused

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
        for module in (index, indexed_dataset):
            patch.setattr(module, "CHUNK", chunk)
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

    monkeypatch.setattr(indexed_dataset, "replace_durably", fail_at_the_index)
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
    with pytest.raises(OutputError):
        IndexedWriter(tmp_path / "file" / "d", np.uint16)


def test_both_missing_files_are_named(tmp_path: Path) -> None:
    with refused(MissingInputError, "dataset", tmp_path / "d") as error:
        IndexedDataset(tmp_path / "d")
    assert f"{tmp_path / 'd.bin'}, {tmp_path / 'd.idx'}" in str(error.value)


@pytest.mark.parametrize(
    ("tokens", "lengths", "field", "value", "most"),
    [
        ([70000], [1], "token id", 70000, "65,535"),
        ([4, -1], [2], "token id", -1, "65,535"),
        ([4], [1 << 31], "tokens in a document", 1 << 31, "2,147,483,647"),
    ],
)
def test_what_the_format_cannot_hold_is_refused_at_write(
    tmp_path: Path, tokens: list[int], lengths: list[int], field: str, value: int, most: str
) -> None:
    with (
        refused(DataError, field, value, remedy=False) as error,
        IndexedWriter(tmp_path / "d", np.uint16) as writer,
    ):
        writer.add_documents(np.array(tokens, np.int64), np.array(lengths, np.int64))
    assert most in error.value.problems[0].reason
    assert list(tmp_path.iterdir()) == []


def test_lengths_must_add_up(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match="3 tokens in documents of 2"),
        IndexedWriter(tmp_path / "d", np.uint16) as w,
    ):
        w.add_documents(np.arange(3), np.array([1, 1]))


def test_ids_are_read_as_they_were_written(tmp_path: Path) -> None:
    write(tmp_path / "d", [[0, 65535]])
    dataset = IndexedDataset(tmp_path / "d")
    assert dataset.document(0).tolist() == [0, 65535]


def test_a_dataset_without_a_manifest_opens_with_one_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "d", DOCUMENTS)
    assert IndexedDataset(tmp_path / "d").manifest is None
    IndexedDataset(tmp_path / "d")
    warning = capsys.readouterr().err
    assert len(warning.splitlines()) == 1
    assert f"llama-mcore inspect-dataset {tmp_path / 'd'} --write-manifest" in warning


def test_only_the_first_rank_of_a_node_warns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    write(tmp_path / "d", DOCUMENTS)
    IndexedDataset(tmp_path / "d")
    assert capsys.readouterr().err == ""


def test_a_manifest_is_used_and_goes_when_its_dataset_is_replaced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prefix = tmp_path / "d"
    write(prefix, DOCUMENTS)
    manifest = build_manifest(prefix)
    write_manifest(prefix, manifest)
    assert IndexedDataset(prefix).manifest == manifest
    assert capsys.readouterr().err == ""
    write(prefix, DOCUMENTS[::-1])
    assert IndexedDataset(prefix).manifest is None


def test_content_ids_with_and_without_a_manifest_cannot_be_confused(tmp_path: Path) -> None:
    for name, documents in {
        "a": DOCUMENTS,
        "same": DOCUMENTS,
        "other": [[5, 6], [7, 8], [9, 10, 11, 12]],
    }.items():
        write(tmp_path / name, documents)
    bare = {name: IndexedDataset(tmp_path / name).content_id for name in ("a", "same", "other")}
    assert bare["a"] == bare["same"] != bare["other"]
    assert bare["a"].startswith("index-only-sha256:")
    write_manifest(tmp_path / "a", build_manifest(tmp_path / "a"))
    assert IndexedDataset(tmp_path / "a").content_id.startswith("sha256:")


def test_a_dataset_that_differs_from_its_manifest_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "d", DOCUMENTS)
    write_manifest(tmp_path / "d", build_manifest(tmp_path / "d"))
    (tmp_path / "d.bin").write_bytes(np.arange(8, dtype=np.uint16).tobytes())
    with refused(DataError, "dataset", tmp_path / "d.bin") as error:
        IndexedDataset(tmp_path / "d")
    assert "block 0" in str(error.value)
