import gzip
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from typer.testing import CliRunner

from llama_mcore.cli import app
from llama_mcore.data.indexed_dataset import IndexedDataset
from llama_mcore.data.manifest import build_manifest, read_manifest
from llama_mcore.errors import DataError, MissingInputError
from llama_mcore.preprocess import merge, pipeline, preprocess
from llama_mcore.preprocess.merge import merge_datasets
from llama_mcore.tokenizer.train import train_tokenizer
from tests.support.errors import refused

SETTINGS = {
    "validation_split": 0.3,
    "append_eod": True,
    "shuffle_seed": 5,
    "on_bad_line": "skip",
    "max_bad_ratio": 1,
}


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "unit_bytes_for", lambda files: 900)
    monkeypatch.setattr(merge, "CHUNK", 500)


def same_data(one: Path, other: Path) -> bool:
    return all(
        Path(f"{one}{suffix}").read_bytes() == Path(f"{other}{suffix}").read_bytes()
        for suffix in (".bin", ".idx")
    )


@pytest.mark.parametrize("count", [2, 3, 11])
def test_merged_shards_are_the_single_run(
    count: int, corpus: Path, tokenizer_model: Path, tmp_path: Path
) -> None:
    spoilt = tmp_path / "spoilt.jsonl"
    spoilt.write_bytes((b"bad\n" + corpus.read_bytes()) * 2 + b"bad\n")
    files = [corpus, spoilt]
    preprocess(files, tokenizer_model, tmp_path / "whole", **SETTINGS)
    quarantined = b""
    for index in range(count):
        preprocess(files, tokenizer_model, tmp_path / "shard", **SETTINGS, shard=f"{index}/{count}")
        quarantine = tmp_path / f"shard_{index:0{len(str(count))}}_of_{count}.quarantine.jsonl"
        quarantined += quarantine.read_bytes() if quarantine.exists() else b""
    assert quarantined == (tmp_path / "whole.quarantine.jsonl").read_bytes()
    for split in ("document", "validation"):
        shards = sorted(tmp_path.glob(f"shard_*_text_{split}.idx"))
        assert len(shards) > 1
        merge_datasets([path.with_suffix("") for path in shards], tmp_path / f"merged_{split}")
        assert same_data(tmp_path / f"merged_{split}", tmp_path / f"whole_text_{split}")
        merged, whole = (
            IndexedDataset(tmp_path / name) for name in (f"merged_{split}", f"whole_text_{split}")
        )
        assert merged.content_id == whole.content_id
        for name in ("text_bytes", "tokenizer_sha256", "vocab_size", "eod"):
            assert getattr(merged.manifest, name) == getattr(whole.manifest, name)
        assert {each.path for each in merged.manifest.inputs} == {str(path) for path in files}


def test_a_file_of_unknown_length_is_in_one_shard(
    corpus: Path, tokenizer_model: Path, tmp_path: Path
) -> None:
    files = []
    for number in range(5):
        files.append(tmp_path / f"{number}.jsonl.gz")
        files[-1].write_bytes(gzip.compress(corpus.read_bytes()))
    preprocess(files, tokenizer_model, tmp_path / "whole")
    for index in range(3):
        preprocess(files, tokenizer_model, tmp_path / "out" / "s", shard=f"{index}/3")
    merge_datasets([tmp_path / "out"], tmp_path / "merged")
    assert same_data(tmp_path / "merged", tmp_path / "whole_text_document")


def test_a_shard_without_documents_writes_nothing(
    tokenizer_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "only"}\n')
    for index in range(3):
        preprocess([tmp_path / "a.jsonl"], tokenizer_model, tmp_path / "s", shard=f"{index}/3")
    assert sorted(path.name for path in tmp_path.glob("s*")) == [
        f"s_0_of_3_text_document{suffix}" for suffix in (".bin", ".idx", ".json")
    ]
    assert "s_1_of_3_text_document: not written, because it has no documents" in capsys.readouterr().out


def megatrons(prefix: Path, documents: list[list[int]], dtype: type[np.integer] = np.uint16) -> Path:
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for ids in documents:
        builder.add_document(np.array(ids, dtype=dtype), [len(ids)] if ids else [])
    builder.finalize(f"{prefix}.idx")
    return prefix


def test_megatrons_datasets_are_merged_by_the_tool(tmp_path: Path) -> None:
    long = list(range(2000))
    parts = [[[1, 2], [3]], [[4], [], long], [[5, 6]]]
    prefixes = [megatrons(tmp_path / str(number), part) for number, part in enumerate(parts)]
    done = CliRunner().invoke(
        app,
        ["merge-datasets", "--input", *map(str, prefixes), "--output-prefix", str(tmp_path / "m")],
    )
    assert done.exit_code == 0, done.output
    assert "5 documents (1 without tokens were left out), 2,006 tokens from 3 datasets" in done.stdout
    megatrons(tmp_path / "expected", [ids for part in parts for ids in part if ids])
    assert same_data(tmp_path / "m", tmp_path / "expected")
    manifest = read_manifest(tmp_path / "m")
    assert manifest == build_manifest(tmp_path / "m")


def test_merging_what_does_not_fit_together_is_refused(
    corpus: Path, tokenizer_model: Path, tmp_path: Path
) -> None:
    train_tokenizer([corpus], tmp_path / "other.model", vocab_size=390)
    preprocess([corpus], tokenizer_model, tmp_path / "a")
    preprocess([corpus], tokenizer_model, tmp_path / "eod", append_eod=True)
    preprocess([corpus], tmp_path / "other.model", tmp_path / "b")
    megatrons(tmp_path / "wide", [[1]], np.int32)
    before = sorted(tmp_path.iterdir())
    a = tmp_path / "a_text_document"
    for other, field in [
        (tmp_path / "b_text_document", "tokenizer_sha256"),
        (tmp_path / "eod_text_document", "eod"),
        (tmp_path / "wide", "dtype"),
    ]:
        with refused(DataError, field, remedy=False) as error:
            merge_datasets([a, other], tmp_path / "m")
        assert str(other) in str(error.value)
    with refused(MissingInputError, "--input", a):
        merge_datasets([a, f"{a}.bin"], tmp_path / "m")
    with refused(MissingInputError, "dataset", tmp_path / "none"):
        merge_datasets([tmp_path / "none"], tmp_path / "m")
    with refused(DataError, "--output-prefix", a):
        merge_datasets([a], a)
    assert sorted(tmp_path.iterdir()) == before


def test_a_damaged_input_is_not_merged(
    corpus: Path, tokenizer_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    preprocess([corpus], tokenizer_model, tmp_path / "a")
    path = tmp_path / "a_text_document.bin"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    monkeypatch.setattr("llama_mcore.data.indexed_dataset.open_problems", lambda manifest, index: [])
    path.write_bytes(content)
    with refused(DataError, "dataset", path):
        merge_datasets([tmp_path / "a_text_document"], tmp_path / "m")
    assert not list(tmp_path.glob("m*"))
