"""tokenizer.json encodes as SentencePiece does, whatever rules a model has, or is not written."""

import json
import random
from collections.abc import Callable
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2 as model_pb2
from transformers import AutoTokenizer

from llama_mcore.convert.convert import convert
from llama_mcore.convert.formats import huggingface
from llama_mcore.convert.formats.huggingface import tokenizer as tokenizer_module
from llama_mcore.convert.registry import WriteOptions
from llama_mcore.convert.verify import texts_of_pieces
from llama_mcore.data.tokenizer import Tokenizer
from llama_mcore.errors import CheckpointError, ConfigError
from llama_mcore.model.config import ModelConfig
from llama_mcore.tokenizer.train import LLAMA_TRAINER
from tests.convert.invented import SHAPES, Invented
from tests.support.errors import check_problem, refused
from tests.support.world import ROOT

SHAPE = ModelConfig(**(SHAPES["mha"].model_dump() | {"vocab_size": 450}))
SYMBOLS = ["<se", "<sep>", "<|user|>", "ab", "bcd", "a b"]
RULES: dict[str, dict[str, Any]] = {
    "llama": {},
    "user-defined": {"user_defined_symbols": SYMBOLS},
    "user-defined without a first space": {"user_defined_symbols": SYMBOLS, "add_dummy_prefix": False},
    "extra spaces removed": {"remove_extra_whitespaces": True},
    "all of it": {
        "remove_extra_whitespaces": True,
        "add_dummy_prefix": False,
        "user_defined_symbols": SYMBOLS,
    },
    "no bytes": {"byte_fallback": False, "user_defined_symbols": SYMBOLS},
    "control tokens and padding": {"pad_id": 3, "control_symbols": ["<ctl>"]},
    "no BOS": {"bos_id": -1, "eos_id": 1},
}


@cache
def corpus() -> list[str]:
    lines = (ROOT / "llama_mcore" / "cli/plan.py").read_text().splitlines()
    return [line for line in lines if line.strip()]


def trained(**rules: Any) -> bytes:
    model = BytesIO()
    settings = LLAMA_TRAINER | {"vocab_size": 450, "minloglevel": 2} | rules
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(corpus()), model_writer=model, **settings)
    return model.getvalue()


def written(model: bytes, folder: Path) -> Tokenizer:
    """With what is written for Hugging Face beside it."""
    (folder / "source.model").write_bytes(model)
    tokenizer = Tokenizer(folder / "source.model")
    for name, content in tokenizer_module.tokenizer_files(tokenizer, 64).items():
        (folder / name).write_bytes(content)
    return tokenizer


def texts(model: bytes) -> list[str]:
    """Of what may be told apart wrongly, in every neighbourhood."""
    draw = random.Random(0)
    atoms = [
        "<0x0A>",
        "<s>",
        "</s>",
        "<unk>",
        "<ctl>",
        " ",
        "  ",
        "\n",
        "\u2581",
        "\u6f22",
        "<",
        "e",
        *"abcd",
    ]
    atoms += SYMBOLS
    mixed = ["".join(draw.choices(atoms, k=draw.randint(1, 6))) for _ in range(3000)]
    return [*texts_of_pieces(model), *mixed, *corpus()]


@pytest.mark.parametrize("rules", RULES)
def test_every_text_is_encoded_as_sentencepiece_does(rules: str, tmp_path: Path) -> None:
    model = trained(**RULES[rules])
    ours = written(model, tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in texts(model):
        ids = ours.encode(text)
        assert theirs.encode(text, split_special_tokens=True) == ids, text
        if theirs.unk_token_id not in ids:
            assert theirs.decode(ids) == ours.decode(ids), text
    for symbol in RULES[rules].get("user_defined_symbols", []):
        if " " not in symbol:  # that SentencePiece never finds
            assert theirs.convert_tokens_to_ids(symbol) in ours.encode(f"x{symbol}")


def test_tokens_that_a_text_spells_are_those_tokens(tmp_path: Path) -> None:
    """So that fine-tuning on texts that end with `</s>` learns to stop."""
    ours = written(trained(), tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs("one</s>")["input_ids"] == [*ours.encode("one"), ours.eod]
    assert theirs("one</s> two")["input_ids"] == [*ours.encode("one"), ours.eod, *ours.encode(" two")]
    assert theirs("<s>one")["input_ids"] == [ours.bos, *ours.encode("one")]
    assert theirs("one</s>", split_special_tokens=True)["input_ids"] == ours.encode("one</s>")


@pytest.mark.parametrize(("rules", "pad"), [("llama", 0), ("control tokens and padding", 3)])
def test_a_batch_is_padded_with_what_no_text_needs(rules: str, pad: int, tmp_path: Path) -> None:
    ours = written(trained(**RULES[rules]), tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    short, long = theirs(["one", "one two three"], padding=True)["input_ids"]
    assert len(short) == len(long)
    assert short[: len(ours.encode("one"))] == ours.encode("one")
    assert set(short[len(ours.encode("one")) :]) == {pad} != {ours.eod}


def edited(change: Callable[[Any], None], **rules: Any) -> bytes:
    proto = model_pb2.ModelProto.FromString(trained(**rules))
    change(proto)
    content: bytes = proto.SerializeToString()
    return content


def unreachable(proto: Any) -> None:
    """The longest word is no longer what its own text is encoded to."""
    normal = [piece for piece in proto.pieces if piece.type == piece.NORMAL and len(piece.piece) > 3]
    normal[0].score = -1e9
    normal[0].piece = normal[0].piece[:-1] + "\u6f22"


def unused(proto: Any) -> None:
    next(piece for piece in proto.pieces if piece.type == piece.NORMAL).type = 5


def custom_rule(folder: Path) -> bytes:
    (folder / "rules.tsv").write_text("41\t61\n")  # A -> a
    return trained(normalization_rule_tsv=str(folder / "rules.tsv"))


REFUSED: dict[str, tuple[Callable[[Path], bytes], str]] = {
    "custom rule": (custom_rule, "normalization rule"),
    "nmt_nfkc": (lambda folder: trained(normalization_rule_name="nmt_nfkc"), "normalization rule"),
    "way back": (
        lambda folder: trained(denormalization_rule_tsv=str(way_back(folder))),
        "denormalization rule",
    ),
    "unigram": (lambda folder: trained(model_type="unigram"), "model_type"),
    "spaces as they are": (
        lambda folder: edited(lambda proto: setattr(proto.normalizer_spec, "escape_whitespaces", False)),
        "escape_whitespaces",
    ),
    "spaces behind": (lambda folder: trained(treat_whitespace_as_suffix=True), "treat_whitespace_as_suffix"),
    "unused": (lambda folder: edited(unused), "unused pieces"),
    "unreachable": (lambda folder: edited(unreachable, user_defined_symbols=SYMBOLS), "piece"),
}


def way_back(folder: Path) -> Path:
    (folder / "back.tsv").write_text("61\t41\n")
    return folder / "back.tsv"


@pytest.mark.parametrize("case", REFUSED)
def test_a_rule_that_cannot_be_said_is_refused_by_name(case: str, tmp_path: Path) -> None:
    make, field = REFUSED[case]
    model = tmp_path / "tokenizer.model"
    model.write_bytes(make(tmp_path))
    weights = Invented(SHAPE, tokenizer=model)
    (tmp_path / "hf").mkdir()
    with refused(ConfigError, f"tokenizer: {field}"):
        huggingface.write(
            weights, tmp_path / "hf", WriteOptions(weights.dtype, weights.kinds), lambda size: None
        )
    assert not list((tmp_path / "hf").iterdir())


Written = dict[str, Any]  # tokenizer.json and tokenizer_config.json


def spoiled(files: dict[str, bytes], spoil: Callable[[Written], Any]) -> dict[str, bytes]:
    content = {name: json.loads(file) for name, file in files.items() if name.endswith(".json")}
    spoil(content["tokenizer.json"] | {"config": content["tokenizer_config.json"]})
    return files | {name: json.dumps(each).encode() for name, each in content.items()}


# What is written otherwise -> the rules that need it as it is.
OTHERWISE: dict[str, tuple[Callable[[Written], Any], str]] = {
    "user-defined": (lambda file: file["pre_tokenizer"]["pretokenizers"].pop(0), "user-defined"),
    "spelled bytes": (lambda file: file["pre_tokenizer"]["pretokenizers"].pop(), "user-defined"),
    "a first space": (lambda file: file["normalizer"]["normalizers"].pop(0), "llama"),
    "end-of-text": (lambda file: file["config"].update(split_special_tokens=True), "llama"),
    "merges": (lambda file: file["model"]["merges"].reverse(), "llama"),
    "the way back": (lambda file: file["decoder"]["decoders"].pop(), "llama"),
}


@pytest.mark.parametrize("case", OTHERWISE)
def test_the_proof_finds_what_is_encoded_otherwise(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil, rules = OTHERWISE[case]
    model = tmp_path / "tokenizer.model"
    model.write_bytes(trained(**RULES[rules]))
    weights = Invented(SHAPE, tokenizer=model)
    (tmp_path / "source").mkdir()
    huggingface.write(
        weights, tmp_path / "source", WriteOptions(weights.dtype, weights.kinds), lambda size: None
    )
    with monkeypatch.context() as patch:
        written = tokenizer_module.tokenizer_files
        patch.setattr(huggingface, "tokenizer_files", lambda *each: spoiled(written(*each), spoil))
        with pytest.raises(CheckpointError) as caught:
            convert(tmp_path / "source", tmp_path / "out", target="hf")
    check_problem(caught.value.problems, "tokenizer", remedy=False)
    assert not json.loads((tmp_path / "out.report.json").read_text())["verified"]
    convert(tmp_path / "source", tmp_path / "out", target="hf")
    assert "tokenizer on" in str(json.loads((tmp_path / "out.report.json").read_text())["compared"])


def test_a_folder_that_transformers_refuses_is_no_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "source").mkdir()
    weights = Invented(SHAPES["mha"])
    huggingface.write(
        weights, tmp_path / "source", WriteOptions(weights.dtype, weights.kinds), lambda size: None
    )
    config = huggingface.hf_config
    monkeypatch.setattr(huggingface, "hf_config", lambda *each: config(*each) | {"use_cache": "neither"})
    with refused(CheckpointError, "transformers", remedy=False):
        convert(tmp_path / "source", tmp_path / "out", target="hf")


def test_the_source_does_not_say_what_is_special(tmp_path: Path) -> None:
    model = tmp_path / "tokenizer.model"
    model.write_bytes(trained())
    weights = Invented(SHAPE, tokenizer=model)
    (tmp_path / "source").mkdir()
    huggingface.write(
        weights, tmp_path / "source", WriteOptions(weights.dtype, weights.kinds), lambda size: None
    )
    other = {"eos_token": "<s>", "pad_token": "</s>"}
    (tmp_path / "source" / "special_tokens_map.json").write_text(json.dumps(other))
    convert(tmp_path / "source", tmp_path / "out", target="hf")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (theirs.eos_token, theirs.pad_token) == ("</s>", "<unk>")


def test_a_tokenizer_that_is_lost_on_the_way_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "tokenizer.model"
    model.write_bytes(trained())
    weights = Invented(SHAPE, tokenizer=model)
    (tmp_path / "source").mkdir()
    huggingface.write(
        weights, tmp_path / "source", WriteOptions(weights.dtype, weights.kinds), lambda size: None
    )
    monkeypatch.setattr(huggingface, "tokenizer_files", lambda *each: {})
    with refused(CheckpointError, "tokenizer", tmp_path / "source" / "tokenizer.model", remedy=False):
        convert(tmp_path / "source", tmp_path / "out", target="hf")
