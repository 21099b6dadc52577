import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from llama_mcore.checkpoint.paths import WEIGHT
from llama_mcore.cli import app
from llama_mcore.convert.convert import convert
from llama_mcore.convert.formats import huggingface
from llama_mcore.convert.registry import NAMES, WriteOptions
from llama_mcore.data.tokenizer import Tokenizer
from llama_mcore.errors import CheckpointError, DataError, MissingInputError
from llama_mcore.generate.generate import generate, sample
from llama_mcore.model.config import ModelConfig
from llama_mcore.model.sharding import parameter_shapes
from llama_mcore.tokenizer.train import train_tokenizer
from tests.support.errors import refused
from tests.support.text import write_jsonl

VOCAB = 320  # padded: the tokenizer has 300
SEQ_LENGTH = 24
UNKNOWN, EOS = 0, 2
MODEL = ModelConfig(
    num_layers=1, hidden_size=VOCAB, num_attention_heads=1, vocab_size=VOCAB, seq_length=SEQ_LENGTH
)


@dataclass
class Counting:
    """Weights of a model whose likeliest next token is always the last one plus `counts_by`.

    Attention and SwiGLU add nothing, embeddings are one-hot, the output layer is the embedding shifted.
    """

    counts_by: int
    model: ModelConfig = MODEL
    tokenizer: Path | None = None
    kinds: tuple[str, ...] = (WEIGHT,)
    dtype: torch.dtype = torch.float32
    step: int = 0

    def names(self) -> list[str]:
        return list(parameter_shapes(self.model))

    def full(self, name: str, kind: str = WEIGHT) -> Tensor:
        shape = parameter_shapes(self.model)[name]
        if "layernorm" in name:
            return torch.ones(shape)
        if name == "embedding.word_embeddings.weight":
            return torch.eye(*shape)
        return (
            torch.eye(*shape).roll(self.counts_by, 0) if name == "output_layer.weight" else torch.zeros(shape)
        )


def write(weights: Counting, folder: Path) -> None:
    huggingface.write(weights, folder, WriteOptions(torch.float32, (WEIGHT,)), lambda size: None)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    corpus = write_jsonl(
        folder / "corpus.jsonl", [{"text": "one two three four, five and six or seven"}] * 50
    )
    train_tokenizer([corpus], folder / "tokenizer.model", vocab_size=300)
    return Tokenizer(folder / "tokenizer.model")


@pytest.fixture(scope="module")
def counting_up(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("up")
    write(Counting(1, tokenizer=tokenizer.path), folder)
    return folder


def test_the_likeliest_tokens_follow(counting_up: Path, tokenizer: Tokenizer) -> None:
    *start, last = tokenizer.encode("one")
    expected = tokenizer.decode([*start, *range(last, last + 6)])
    assert generate(counting_up, "one", max_new_tokens=5, temperature=0) == expected


def test_it_ends_with_eos(tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bytes are the tokens after EOS, 3 being the byte 0: counting down meets EOS after it."""
    write(Counting(-1, tokenizer=tokenizer.path), tmp_path)
    assert generate(tmp_path, "one\x02", max_new_tokens=9, temperature=0) == "one\x02\x01\x00"
    assert "end-of-text, after 3 tokens" in capsys.readouterr().err
    assert generate(tmp_path, "one\x02", max_new_tokens=2, temperature=0) == "one\x02\x01\x00"
    assert "end-of-text" not in capsys.readouterr().err


def test_it_ends_where_the_context_is_full(counting_up: Path, tokenizer: Tokenizer) -> None:
    prompt = "one\x02"
    *start, last = tokenizer.encode(prompt)
    expected = tokenizer.decode([*start, *range(last, last + SEQ_LENGTH - len(start))])
    assert generate(counting_up, prompt, max_new_tokens=500, temperature=0) == expected


def test_an_empty_prompt_begins_a_document(counting_up: Path) -> None:
    """The text starts after EOS; its three tokens are the first bytes."""
    assert generate(counting_up, "", max_new_tokens=3, temperature=0) == "\x00\x01\x02"


def test_padding_of_the_vocabulary_is_never_chosen(counting_up: Path, tokenizer: Tokenizer) -> None:
    last = tokenizer.vocab_size - 1
    ids = tokenizer.encode(tokenizer.decode([last]))
    assert ids[-1] == last
    expected = tokenizer.decode([*ids, UNKNOWN])
    assert generate(counting_up, tokenizer.decode([last]), max_new_tokens=1, temperature=0) == expected


@pytest.mark.process  # some formats are read in one
@pytest.mark.parametrize("name", NAMES)
def test_any_format_continues_alike(
    name: str, counting_up: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    convert(counting_up, tmp_path / "out", target=name, verify=False)
    texts = {
        generate(folder, "one", tokenizer_model=tokenizer.path, max_new_tokens=5, temperature=0)
        for folder in (counting_up, tmp_path / "out")
    }
    assert len(texts) == 1


def test_the_seed_decides(counting_up: Path) -> None:
    first, again, other = (
        generate(counting_up, "one", max_new_tokens=8, temperature=100.0, top_p=1.0, seed=seed)
        for seed in (1, 1, 2)
    )
    assert first == again != other


def test_temperature_shapes_the_draws() -> None:
    logits, generator = torch.tensor([0.0, 1.0]), torch.Generator().manual_seed(0)
    for temperature in (0.5, 1.0, 2.0):
        draws = [sample(logits, temperature, 1.0, generator) for _ in range(4000)]
        expected = (logits / temperature).softmax(-1)[1].item()
        # six standard errors of 4,000 draws
        assert sum(draws) / len(draws) == pytest.approx(expected, abs=0.05)


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.0, {1}), (0.5, {1}), (0.6, {1, 3}), (0.81, {0, 1, 3}), (1.0, {0, 1, 2, 3})]
)
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p: float, kept: set[int]) -> None:
    logits, generator = torch.tensor([0.15, 0.55, 0.05, 0.25]).log(), torch.Generator().manual_seed(0)
    assert {sample(logits, 1.0, top_p, generator) for _ in range(500)} == kept


def test_missing_checkpoint(tmp_path: Path) -> None:
    with refused(MissingInputError, "--checkpoint", tmp_path / "nothing", remedy=False):
        generate(tmp_path / "nothing", "one")


def test_missing_tokenizer(tokenizer: Tokenizer, tmp_path: Path) -> None:
    write(Counting(1), tmp_path)
    for given in (None, tmp_path / "nothing.model"):
        with refused(MissingInputError, "tokenizer", given or "(not given)") as caught:
            generate(tmp_path, "one", tokenizer_model=given)
        assert "--tokenizer-model" in caught.value.problems[0].remedy
    assert generate(tmp_path, "one", tokenizer_model=tokenizer.path, max_new_tokens=1).startswith("one")


def test_tokenizer_of_a_larger_vocabulary(tokenizer: Tokenizer, tmp_path: Path) -> None:
    small = MODEL.model_copy(update={"vocab_size": 299})
    write(Counting(1, small), tmp_path)
    with refused(CheckpointError, "tokenizer", tokenizer.path) as caught:
        generate(tmp_path, "one", tokenizer_model=tokenizer.path)
    assert re.search(r"\b300\b.*\b299\b", caught.value.problems[0].reason)


def test_prompt_that_fills_the_context(counting_up: Path) -> None:
    with refused(DataError, "--prompt") as caught:
        generate(counting_up, "7" * SEQ_LENGTH)
    assert f"seq_length = {SEQ_LENGTH}" in caught.value.problems[0].reason


def test_command(counting_up: Path) -> None:
    arguments = ["--checkpoint", str(counting_up), "--prompt", "one", "--temperature", "0"]
    result = CliRunner().invoke(app, ["generate", *arguments, "--max-new-tokens", "3"])
    assert result.exit_code == 0
    assert result.stdout.startswith("one")
    result = CliRunner().invoke(app, ["generate", *arguments, "--tokenizer-model", "nothing.model"])
    assert result.exit_code == MissingInputError.exit_code
    assert result.stdout == ""
