from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_mcore.data.tokenizer import Tokenizer
from llama_mcore.errors import DataError, MissingInputError
from tests.support.errors import refused


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


def test_model_that_is_missing_or_none(tmp_path: Path, tokenizer_model: Path) -> None:
    with refused(MissingInputError, "tokenizer", tmp_path / "no.model"):
        Tokenizer(tmp_path / "no.model")
    model = tokenizer_model.read_bytes()
    for content in (b"", b"hello world", model[: len(model) // 2]):
        (tmp_path / "bad.model").write_bytes(content)
        with refused(DataError, "tokenizer", tmp_path / "bad.model"):
            Tokenizer(tmp_path / "bad.model")
