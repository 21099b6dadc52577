"""Finished datasets and tokenizers: the same command finds its work done, another one does not replace it."""

from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from llama_mcore.cli import app
from llama_mcore.data.indexed_dataset import IndexedDataset
from llama_mcore.data.manifest import manifest_path
from llama_mcore.errors import DataError, OutputError
from llama_mcore.preprocess import preprocess
from llama_mcore.preprocess.merge import merge_datasets
from llama_mcore.preprocess.pipeline import Pipeline
from llama_mcore.tokenizer import train
from llama_mcore.tokenizer.train import train_tokenizer
from tests.support.errors import check_problem, is_shown, refused
from tests.support.text import write_jsonl
from tests.tokenizer.test_train import record_of

NOTHING = "already there, nothing to do"
SUFFIXES = (".bin", ".idx", ".json")


def run(*words: object) -> Result:
    return CliRunner().invoke(app, [*map(str, words)])


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {
        path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir() if path.is_file()
    }


def made_again(*args: object) -> None:
    raise AssertionError("it is made again")


def test_a_dataset_with_a_validation_set_is_not_replaced_by_one_without(
    corpus: Path, tokenizer_model: Path, tmp_path: Path
) -> None:
    preprocess([corpus], tokenizer_model, tmp_path / "d", validation_split=0.3)
    before = contents(tmp_path)
    words = ("preprocess-data", "--input", corpus, "--tokenizer-model", tokenizer_model)
    again = run(*words, "--output-prefix", tmp_path / "d")
    assert again.exit_code == OutputError.exit_code
    for split in ("document", "validation"):
        assert is_shown(again.output, "--output-prefix", tmp_path / f"d_text_{split}")
    assert "validation_split 0.3, not 0.0" in again.output
    assert contents(tmp_path) == before
    assert run(*words, "--output-prefix", tmp_path / "d", "--force").exit_code == 0
    assert sorted(contents(tmp_path)) == [f"d_text_document{suffix}" for suffix in SUFFIXES]
    assert IndexedDataset(tmp_path / "d_text_document").num_documents == 117


def test_the_same_job_finds_its_work_done(
    corpus: Path,
    tokenizer_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    preprocess([corpus], tokenizer_model, tmp_path / "d", validation_split=0.3)
    before = contents(tmp_path)
    monkeypatch.setattr(Pipeline, "_make_datasets", made_again)
    capsys.readouterr()
    preprocess([corpus], tokenizer_model, tmp_path / "d", validation_split=0.3, encoder="sentencepiece")
    assert capsys.readouterr().out.count(NOTHING) == 2
    assert contents(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []
    with pytest.raises(AssertionError):
        preprocess([corpus], tokenizer_model, tmp_path / "d", validation_split=0.3, force=True)


def test_an_incomplete_dataset_is_made_again(corpus: Path, tokenizer_model: Path, tmp_path: Path) -> None:
    preprocess([corpus], tokenizer_model, tmp_path / "d", validation_split=0.3)
    whole = {name: content for name, (content, _) in contents(tmp_path).items()}
    (tmp_path / "d_text_validation.idx").unlink()
    (tmp_path / "d_text_document.bin").write_bytes(b"")
    preprocess([corpus], tokenizer_model, tmp_path / "d", validation_split=0.3)
    assert {name: content for name, (content, _) in contents(tmp_path).items()} == whole


@pytest.mark.parametrize("change", ["input", "tokenizer", "bad lines", "manifest gone", "manifest spoilt"])
def test_a_dataset_of_another_job_stays(change: str, tokenizer_model: Path, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": "one"}, {"text": "two"}])
    model, settings = tokenizer_model, {}
    preprocess([source], model, tmp_path / "out" / "d")
    manifest = manifest_path(tmp_path / "out" / "d_text_document")
    if change == "input":
        write_jsonl(source, [{"text": "one"}, {"text": "TWO"}])
    elif change == "tokenizer":
        model = tmp_path / "other.model"
        train_tokenizer([write_jsonl(tmp_path / "b.jsonl", [{"text": "three"}])], model, vocab_size=264)
    elif change == "bad lines":
        settings = {"on_bad_line": "skip"}
    elif change == "manifest gone":
        manifest.unlink()
    else:
        manifest.write_text("{}")
    before = contents(tmp_path / "out")
    with refused(OutputError, "--output-prefix", tmp_path / "out" / "d_text_document"):
        preprocess([source], model, tmp_path / "out" / "d", **settings)
    assert contents(tmp_path / "out") == before
    assert not list((tmp_path / "out").glob("*.parts"))
    preprocess([source], model, tmp_path / "out" / "d", force=True, **settings)


def test_the_quarantine_of_another_job_stays(tokenizer_model: Path, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": "one", "body": "two"}, {"body": "three"}])
    words = ("preprocess-data", "--input", source, "--tokenizer-model", tokenizer_model)
    words = (*words, "--output-prefix", tmp_path / "out/d", "--on-bad-line", "skip", "--max-bad-ratio")
    quarantine = tmp_path / "out/d.quarantine.jsonl"
    assert run(*words, 0.1).exit_code == DataError.exit_code
    assert run(*words, 0.5).exit_code == 0  # its own list
    before = contents(tmp_path / "out")
    refusal = run(*words, 0.5, "--json-keys", "body")
    assert (refusal.exit_code, is_shown(refusal.output, "--output-prefix", quarantine)) == (73, True)
    assert contents(tmp_path / "out") == before
    assert not list((tmp_path / "out").glob("*.parts"))
    (tmp_path / "out/d_text_document.idx").unlink()
    assert run(*words, 0.5).exit_code == 0
    assert quarantine.exists()
    assert run(*words, 0.5, "--json-keys", "body", "--force").exit_code == 0
    assert not quarantine.exists()


def test_merging_again(
    corpus: Path, tokenizer_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b"):
        preprocess([corpus], tokenizer_model, tmp_path / name, shuffle_seed=ord(name))
    a, b = (tmp_path / f"{name}_text_document" for name in "ab")
    (tmp_path / "m").mkdir()
    merge_datasets([a, b], tmp_path / "m" / "m")
    before = contents(tmp_path / "m")
    merge_datasets([a, b], tmp_path / "m" / "m")
    assert NOTHING in capsys.readouterr().out
    words = ("merge-datasets", "--input", b, a, "--output-prefix", tmp_path / "m" / "m")
    refusal = run(*words)
    assert refusal.exit_code == OutputError.exit_code
    assert is_shown(refusal.output, "--output-prefix", tmp_path / "m" / "m")
    assert contents(tmp_path / "m") == before
    assert run(*words, "--force").exit_code == 0
    assert contents(tmp_path / "m") != before


@pytest.mark.parametrize("other", ["a_text_validation", "b_text_document"])
def test_validation_sets_are_not_merged_with_others(
    other: str, corpus: Path, tokenizer_model: Path, tmp_path: Path
) -> None:
    for name, share in (("a", 0.3), ("b", 0.4)):
        preprocess([corpus], tokenizer_model, tmp_path / name, validation_split=share)
    with pytest.raises(DataError) as error:
        merge_datasets([tmp_path / "a_text_document", tmp_path / other], tmp_path / "m")
    check_problem(error.value.problems, "split" if other[0] == "a" else "validation_split", remedy=False)


def test_a_tokenizer_is_not_replaced_by_another(corpus: Path, tmp_path: Path) -> None:
    model = tmp_path / "t.model"
    train_tokenizer([corpus], model, vocab_size=400)
    before = contents(tmp_path)
    words = ("train-tokenizer", "--input", corpus, "--output", model, "--vocab-size", 390)
    refusal = run(*words)
    assert refusal.exit_code == OutputError.exit_code
    assert is_shown(refusal.output, "--output", model)
    assert "vocab_size 400, not 390" in refusal.output
    assert contents(tmp_path) == before
    assert run(*words, "--force").exit_code == 0
    assert record_of(model)["vocab_size"] == 390


@pytest.mark.parametrize("spoilt", ["t.model", "t.model.json"])
def test_a_tokenizer_without_its_record_stays(spoilt: str, corpus: Path, tmp_path: Path) -> None:
    train_tokenizer([corpus], tmp_path / "t.model", vocab_size=400)
    (tmp_path / spoilt).write_bytes(b"{}")
    with refused(OutputError, "--output", tmp_path / "t.model"):
        train_tokenizer([corpus], tmp_path / "t.model", vocab_size=400)
    assert (tmp_path / spoilt).read_bytes() == b"{}"


def test_the_same_tokenizer_is_learnt_once(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "t.model"
    train_tokenizer([corpus], model, vocab_size=400)
    before = contents(tmp_path)
    monkeypatch.setattr(train, "_learn", made_again)
    train_tokenizer([corpus], model, vocab_size=400)
    assert NOTHING in capsys.readouterr().out
    assert contents(tmp_path) == before
    train_tokenizer([corpus], model, vocab_size=400, report=True)
    assert "bytes/token" in capsys.readouterr().out
    assert model.read_bytes() == before["t.model"][0]
    report = record_of(model)["report"]
    train_tokenizer([corpus], model, vocab_size=400)
    assert record_of(model)["report"] == report is not None


def test_a_tokenizer_goes_on_where_it_was_killed_before_it_appeared(corpus: Path, tmp_path: Path) -> None:
    model = tmp_path / "t.model"
    train_tokenizer([corpus], model, vocab_size=400)
    content = model.read_bytes()
    model.unlink()
    train_tokenizer([corpus], model, vocab_size=400)
    assert model.read_bytes() == content
