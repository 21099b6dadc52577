from collections.abc import Callable
from pathlib import Path

import pytest

from llama_mcore.data.config import DataConfig, SourceConfig
from llama_mcore.data.sources import missing_inputs, open_sources, plan_run
from llama_mcore.errors import DataError, MissingInputError
from llama_mcore.preprocess import preprocess
from llama_mcore.tokenizer.train import train_tokenizer
from tests.support.errors import check_problem, refused

SEQ_LENGTH = 16


@pytest.fixture(scope="module")
def made(corpus: Path, tokenizer_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Makes a dataset of the corpus, once for the same settings, and gives its prefix."""
    folder = tmp_path_factory.mktemp("made")

    def make(split: str = "document", **settings: object) -> str:
        name = "-".join(f"{key}{value}" for key, value in settings.items()) or "plain"
        preprocess([corpus], tokenizer_model, folder / name, **settings)
        return f"{folder / name}_text_{split}"

    return make


def plan(**data: object) -> None:
    config = DataConfig(**data)
    plan_run(config, open_sources(config, SEQ_LENGTH, 400), 0, SEQ_LENGTH)


@pytest.mark.parametrize(
    ("train", "valid"),
    [
        ({"validation_split": 0.3}, {"validation_split": 0.3}),
        ({"validation_split": 0.4}, {"validation_split": 0.3}),  # of which nothing is in the rest
    ],
)
def test_validation_set_that_was_split_off_is_accepted(
    train: dict, valid: dict, made: Callable[..., str]
) -> None:
    plan(train=made(**train), valid=made("validation", **valid))


@pytest.mark.parametrize(
    ("train", "valid"),
    [
        ({}, {"validation_split": 0.3}),
        ({"validation_split": 0.2}, {"validation_split": 0.3}),
        ({"split": "validation", "validation_split": 0.3}, {"validation_split": 0.3}),
        ({"validation_split": 0.3, "append_eod": True}, {"validation_split": 0.3}),
    ],
)
def test_a_validation_set_of_another_training_set_is_refused(
    train: dict, valid: dict, made: Callable[..., str]
) -> None:
    validation = made("validation", **valid)
    with refused(DataError, "dataset", validation):
        plan(train=made(**train), valid=validation)


def test_validation_set_of_different_text_is_accepted(
    made: Callable[..., str], tokenizer_model: Path, corpus: Path, tmp_path: Path
) -> None:
    (tmp_path / "other.jsonl").write_bytes(corpus.read_bytes()[: 1 << 13].rpartition(b"\n")[0])
    preprocess([tmp_path / "other.jsonl"], tokenizer_model, tmp_path / "d", validation_split=0.5)
    plan(train=made(), valid=f"{tmp_path / 'd'}_text_validation")


def test_validation_set_of_another_key_is_accepted(
    made: Callable[..., str], corpus: Path, tokenizer_model: Path, tmp_path: Path
) -> None:
    preprocess([corpus], tokenizer_model, tmp_path / "d", json_keys=["title"], validation_split=0.5)
    plan(train=made(), valid=f"{tmp_path / 'd'}_title_validation")


def test_a_wrong_tokenizer_is_named_once_with_the_right_one(
    made: Callable[..., str], corpus: Path, tokenizer_model: Path, tmp_path: Path
) -> None:
    wrong = tmp_path / "wrong.model"
    train_tokenizer([corpus], wrong, vocab_size=390)
    train, valid = made(validation_split=0.3), made("validation", validation_split=0.3)
    with refused(DataError, "data.tokenizer", wrong) as error:
        plan(train=train, valid=valid, tokenizer=str(wrong))
    (problem,) = error.value.problems
    assert train in problem.reason
    assert valid in problem.reason
    assert str(tokenizer_model) in problem.remedy


def test_data_of_two_tokenizers_names_both(
    made: Callable[..., str], corpus: Path, tokenizer_model: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.model"
    train_tokenizer([corpus], other, vocab_size=390)
    preprocess([corpus], other, tmp_path / "d")
    second = f"{tmp_path / 'd'}_text_document"
    with refused(DataError, "dataset", second) as error:
        plan(train=[made(), second])
    assert str(other) in str(error.value)
    assert str(tokenizer_model) in str(error.value)


def test_missing_data_is_named_by_its_settings(tmp_path: Path) -> None:
    source = SourceConfig(train=[str(tmp_path / "a"), str(tmp_path / "b")], valid=str(tmp_path / "c"))
    config = DataConfig(sources={"wiki": source}, tokenizer=str(tmp_path / "t.model"))
    with pytest.raises(MissingInputError) as error:
        open_sources(config, SEQ_LENGTH, 400)
    for setting, name in (("train", "a"), ("train", "b"), ("valid", "c")):
        check_problem(error.value.problems, f"data.sources.wiki.{setting}", tmp_path / name)
    check_problem(error.value.problems, "data.tokenizer", tmp_path / "t.model")
    assert len(error.value.problems) == 4


@pytest.mark.parametrize("given", ["d_text_document.bin", "d_text_document.idx", "d", "d.bin"])
def test_missing_dataset_with_a_name_that_is_almost_right(given: str, tmp_path: Path) -> None:
    for ending in (".bin", ".idx"):
        (tmp_path / f"d_text_document{ending}").touch()
    (problem,) = missing_inputs(DataConfig(train=str(tmp_path / given)))
    assert (problem.field, problem.value) == ("data.train", str(tmp_path / given))
    assert problem.remedy == f"did you mean {tmp_path / 'd_text_document'}?"


@pytest.mark.parametrize(
    ("given", "remedy"),
    [("0.3 A 0.7 B", "data.sources: {"), ("nowhere.idx", "without its ending: nowhere"), ("nowhere", "make")],
)
def test_missing_dataset_and_what_its_name_may_mean(given: str, remedy: str) -> None:
    (problem,) = missing_inputs(DataConfig(train=given))
    assert (problem.field, remedy in problem.remedy) == ("data.train", True), problem


def test_many_inputs_that_are_missing_are_one_problem() -> None:
    sources = {f"s{number}": SourceConfig(train=f"nowhere/{number}") for number in range(5)}
    (problem,) = missing_inputs(DataConfig(sources=sources))
    assert "5 inputs" in problem.reason
    assert "data.sources.s3.train nowhere/3 ..." in str(problem.value)
    assert "--data-later" in problem.remedy


def test_the_demos_data_is_made_by_the_demo() -> None:
    names = (f"runs/demo/data/{name}" for name in ("a", "b"))
    source = SourceConfig(train=next(names), valid=next(names))
    config = DataConfig(sources={"s": source}, tokenizer="runs/demo/tokenizer/nowhere.model")
    (problem,) = missing_inputs(config)
    assert (problem.field, "`make demo`" in problem.remedy) == ("data", True)
