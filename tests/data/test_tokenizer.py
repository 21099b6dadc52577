from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_mcore.data.tokenizer import Tokenizer
from llama_mcore.data.tokenizer_training import train_tokenizer
from llama_mcore.errors import DataError, MissingInputError, OutputError
from tests.data.conftest import write_jsonl


@pytest.fixture(scope="module")
def tokenizer(tokenizer_model: Path) -> Tokenizer:
    return Tokenizer(tokenizer_model)


def test_vocabulary_and_control_tokens(tokenizer: Tokenizer) -> None:
    assert (tokenizer.vocab_size, tokenizer.bos, tokenizer.eod) == (400, 1, 2)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "  two spaces before and after  ",
        "\n\n\ttabs\t\r\n",
        "x = 2024  # comment\n    y = 1\n",
        "\U0001f9ea \u6f22\u5b57 \u0e20\u0e32\u0e29\u0e32 e\u0301 \ufeff \u2028 \u00a0",
        "\x00\x07\x7f",
        "<s></s><unk><0x0A>",
    ],
)
def test_round_trip(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581")))
def test_round_trip_of_any_text_without_unknown_or_control_token(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(3 <= token < tokenizer.vocab_size for token in ids)


def test_the_space_mark_itself_comes_back_as_a_space(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode("a\u2581b")) == "a b"


def test_digits_are_split_one_by_one(tokenizer_model: Path) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_model))
    pieces = [processor.id_to_piece(token) for token in range(259, processor.vocab_size())]
    assert not [piece for piece in pieces if len(piece) > 1 and any(c.isdigit() for c in piece)]
    assert processor.encode("1984", out_type=str)[-4:] == ["1", "9", "8", "4"]


def test_layout_is_llamas(tokenizer_model: Path) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_model))
    first = [processor.id_to_piece(token) for token in (0, 1, 2, 3, 258)]
    assert first == ["<unk>", "<s>", "</s>", "<0x00>", "<0xFF>"]
    assert all(processor.is_byte(token) for token in range(3, 259))
    assert processor.pad_id() == -1


def test_same_corpus_gives_same_bytes(corpus: Path, tokenizer_model: Path, tmp_path: Path) -> None:
    train_tokenizer([corpus], tmp_path / "again.model", vocab_size=400)
    assert Tokenizer(tmp_path / "again.model").sha256 == Tokenizer(tokenizer_model).sha256


def test_training_speaks_in_lines_of_its_own(
    corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    train_tokenizer([corpus], tmp_path / "quiet.model", vocab_size=400)
    out, err = capfd.readouterr()
    assert Tokenizer(tmp_path / "quiet.model").sha256 in out
    assert len(out.splitlines()) == len(err.splitlines()) == 1


def test_vocabulary_larger_than_the_corpus_supports(tmp_path: Path) -> None:
    corpus = write_jsonl(tmp_path / "small.jsonl", [{"text": "hello world"}])
    with pytest.raises(DataError, match=r"vocab_size = 4096: .* at most (\d+); .*--vocab-size \1") as error:
        train_tokenizer([corpus], tmp_path / "t.model", vocab_size=4096)
    most = int(error.value.problems[0].bound.split()[-1])
    train_tokenizer([corpus], tmp_path / "t.model", vocab_size=most)
    assert Tokenizer(tmp_path / "t.model").vocab_size == most


def test_vocabulary_smaller_than_the_bytes(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="vocab_size = 100: must be at least"):
        train_tokenizer([corpus], tmp_path / "t.model", vocab_size=100)


@pytest.mark.parametrize("documents", [[], [{"text": ""}], [{"text": "x" * 5000}]])
def test_corpus_without_a_usable_line(documents: list[dict[str, object]], tmp_path: Path) -> None:
    corpus = write_jsonl(tmp_path / "c.jsonl", documents)
    with pytest.raises(DataError, match="hold no line of text"):
        train_tokenizer([corpus], tmp_path / "t.model", vocab_size=300)
    assert list(tmp_path.iterdir()) == [corpus]


def test_a_bad_line_is_named_and_nothing_is_left(tmp_path: Path) -> None:
    corpus = tmp_path / "c.jsonl"
    corpus.write_text('{"text": "fine"}\nnot JSON\n')
    with pytest.raises(DataError, match=rf"^data error: input = {corpus} line 2: is not JSON"):
        train_tokenizer([corpus], tmp_path / "t.model", vocab_size=300)
    assert list(tmp_path.iterdir()) == [corpus]


def test_output_that_cannot_be_written(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="is a file, not a folder"):
        train_tokenizer([corpus], tmp_path / "file" / "t.model", vocab_size=300)
    with pytest.raises(OutputError, match="cannot be written"):
        train_tokenizer([corpus], tmp_path / "file" / "deeper" / "t.model", vocab_size=300)
    with pytest.raises(OutputError, match="is a folder"):
        train_tokenizer([corpus], tmp_path, vocab_size=300)


def test_model_that_is_missing_or_none(tmp_path: Path, tokenizer_model: Path) -> None:
    with pytest.raises(MissingInputError, match="no\\.model"):
        Tokenizer(tmp_path / "no.model")
    model = tokenizer_model.read_bytes()
    for content in (b"", b"hello world", model[: len(model) // 2]):
        (tmp_path / "bad.model").write_bytes(content)
        with pytest.raises(DataError, match="is not a SentencePiece model"):
            Tokenizer(tmp_path / "bad.model")
