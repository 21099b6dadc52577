"""gigatoken gives sentencepiece's ids for every text; where it would not, sentencepiece does the work."""

import io
import math
import os
import random
import runpy
import string
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gigatoken
import numpy as np
import psutil
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece.sentencepiece_model_pb2 import ModelProto, TrainerSpec

from llama_mcore.errors import DataError, MissingInputError
from llama_mcore.preprocess.encoders import Encoder, SentencePieceEncoder, load_encoder, self_check
from llama_mcore.preprocess.encoders.gigatoken import GigatokenEncoder
from llama_mcore.preprocess.encoders.text_split import TextSplitter
from llama_mcore.tokenizer.train import LLAMA_TRAINER
from tests.support.errors import refused
from tests.support.world import ROOT

# Text of the whole-corpus test. `make test-data` asks for more.
CORPUS_MB = float(os.environ.get("TEST_CORPUS_MB", "2"))
BUILD_CORPUS = ROOT / "tools" / "build_corpus.py"

ALPHA, BETA, GAMMA, DELTA = "\u03b1\u03b2\u03b3\u03b4"
FAMILY = "\U0001f469\u200d\U0001f469\u200d\U0001f467"
TEXTS = {
    "empty": "",
    "one space": " ",
    "spaces around": "  two spaces  ",
    "runs of spaces of every length": "".join("x" + " " * length for length in range(70)),
    "begin of sequence": "a<s>b",
    "end of sequence": "</s>",
    "unknown": "<unk> <unk>",
    "a control token of one character": DELTA,
    "bytes in capitals": "<0x0A><0xFF>",
    "bytes in small letters": "<0xab>",
    "space mark": "\u2581a\u2581 \u2581\u2581 b\u2581",
    "neighbours of the space mark": "\u2580\u2582\u00e2\u0096\u0081",
    "line ends and tabs": "\n\n\ta\r\n\t\tb\r\r\n",
    "control characters": "".join(map(chr, range(32))) + "\x7f\x80\x9f",
    "NUL inside": "a\0b \0\0 .\0,",
    "punctuation": "a.b,c\"d)e;f:g!h?i ..,, !? .\" ('x'); a ,b .c",
    "other spaces": "\u00a0 \u2003\u2028\u2029\u3000\ufeff\u200b\u1680\x85\x0b\x0c",
    "emoji": FAMILY + "\U0001f642\U0001f3fd\u2764\ufe0f" + FAMILY,
    "combining marks": "e\u0301 \u0301 a\u0308\u0323" + "\u0301" * 50,
    "compatibility characters": "\ufb01 \u2167 \u00b2 \uff21\uff12 \u0130\u1e9e",
    "digits of all scripts": "2024 \u0662\u0660\u0662\u0664 \u096f\u09e9 \uff11\uff12 \U0001d7d8",
    "unassigned and noncharacters": "\u0378 \ufdd0 \ufffe\uffff \U0001fffe\U0010ffff \U000e0001 \ue000\ufffd",
    "no spaces": "\u65e5\u672c\u8a9e" * 100,
    "long word of one character": "a" * 5000,
    "long word of two characters": "ab" * 3000,
    "a megabyte without a space": string.ascii_letters * 20_000,
}
# What hypothesis builds texts of, beside any characters.
PARTS = [*"ab \n\t.,\u2581\0", *(text for text in TEXTS.values() if len(text) < 80)]

characters = st.characters(exclude_categories=["Cs"])
parts = st.one_of(st.sampled_from(PARTS), st.text(characters, max_size=8))
texts_of_parts = st.lists(st.lists(parts, max_size=12).map("".join), max_size=12)


@pytest.fixture(scope="module")
def documents() -> list[str]:
    collect = runpy.run_path(str(BUILD_CORPUS))["collect"]
    chosen = collect(int(CORPUS_MB * 1e6)).values()
    return [text.decode() for _, text in chosen]


def train(documents: list[str], **changes: object) -> ModelProto:
    lines = [line for text in documents for line in text.split("\n")]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(random.Random(0).sample(lines, min(len(lines), 20_000))),
        model_writer=model,
        minloglevel=2,
        **LLAMA_TRAINER | {"vocab_size": 1200} | changes,
    )
    return ModelProto.FromString(model.getvalue())


def with_pieces(model: ModelProto, *pieces: str) -> ModelProto:
    """Pieces that sentencepiece merges before all others, in this order."""
    known = {piece.piece for piece in model.pieces}
    new = [piece for piece in dict.fromkeys(pieces) if piece not in known]
    changed = copy(model)
    for number, piece in enumerate(new):
        score = 1.0 + len(new) - number
        changed.pieces.add(piece=piece, score=score, type=ModelProto.SentencePiece.NORMAL)
    return changed


def copy(model: ModelProto) -> ModelProto:
    return ModelProto.FromString(model.SerializeToString())


def typed(model: ModelProto, piece_type: int, name: str, *others: str) -> ModelProto:
    changed = with_pieces(model, ALPHA, BETA, GAMMA, name, *others)
    next(piece for piece in changed.pieces if piece.piece == name).type = piece_type
    return changed


def starts(text: str) -> list[str]:
    return [text[:end] for end in range(1, len(text) + 1)]


def runs_of_one_score(model: ModelProto) -> ModelProto:
    """Runs of 2 to 16 spaces as in the released LLaMA tokenizer: one score, below all others."""
    changed = copy(model)
    kept = [piece for piece in model.pieces if "\u2581\u2581" not in piece.piece]
    del changed.pieces[:]
    changed.pieces.extend(kept)
    # Not by length: the order of the ids must not matter.
    for length in (2, 4, 8, 5, 16, 6, 12, 13, 10, 14, 3, 9, 7, 11, 15):
        changed.pieces.add(piece="\u2581" * length, score=-1e9, type=ModelProto.SentencePiece.NORMAL)
    return changed


MODELS: dict[str, Callable[[list[str]], ModelProto]] = {
    "llama": train,
    "few pieces": lambda documents: train(documents, vocab_size=500),
    "runs of one score": lambda documents: runs_of_one_score(train(documents)),
    "no space before": lambda documents: train(documents, add_dummy_prefix=False),
    "pieces across spaces": lambda documents: train(documents, vocab_size=3000, split_by_whitespace=False),
    "spells special tokens": lambda documents: typed(
        with_pieces(
            train(documents), *starts("<unk"), *starts("</s"), *starts("<0x0A"), *starts("<0xF"), *">FAunkxs0"
        ),
        ModelProto.SentencePiece.CONTROL,
        DELTA,
    ),
}


@pytest.fixture(scope="module")
def models(documents: list[str]) -> dict[str, ModelProto]:
    return {name: make(documents) for name, make in MODELS.items()}


@pytest.fixture(scope="module", params=MODELS)
def model(models: dict[str, ModelProto], request: pytest.FixtureRequest) -> ModelProto:
    return models[request.param]


@pytest.fixture(scope="module")
def fast(model: ModelProto, tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    encoder = load_encoder("gigatoken", saved(model, tmp_path_factory.mktemp("fast")))
    assert (encoder.name, encoder.fallback_reason) == ("gigatoken", None)
    return encoder


@pytest.fixture(scope="module")
def definition(model: ModelProto) -> "Definition":
    return Definition(model)


class Definition:
    """sentencepiece itself, nothing around it."""

    def __init__(self, model: ModelProto) -> None:
        self.processor = sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())

    def ids(self, text: str) -> list[int]:
        return list(self.processor.encode(text))


def saved(model: ModelProto, folder: Path) -> Path:
    path = folder / "tokenizer.model"
    path.write_bytes(model.SerializeToString())
    return path


def rows(encoder: Encoder, texts: list[str]) -> list[list[int]]:
    ids, lengths = encoder.encode(texts)
    assert (ids.dtype, lengths.dtype) == (np.int32, np.int32)
    assert (len(lengths), lengths.sum()) == (len(texts), len(ids))
    ends = [0, *np.cumsum(lengths).tolist()]
    return [ids[start:end].tolist() for start, end in pairwise(ends)]


def test_known_texts(fast: Encoder, definition: Definition) -> None:
    for name, row, text in zip(TEXTS, rows(fast, list(TEXTS.values())), TEXTS.values(), strict=True):
        assert row == definition.ids(text), name


def test_real_text(fast: Encoder, definition: Definition, documents: list[str]) -> None:
    for row, text in zip(rows(fast, documents), documents, strict=True):
        assert row == definition.ids(text), text[:60]


@settings(max_examples=100, deadline=None)
@given(texts=texts_of_parts)
def test_any_text(fast: Encoder, definition: Definition, texts: list[str]) -> None:
    assert rows(fast, texts) == [definition.ids(text) for text in texts]


def test_every_character(models: dict[str, ModelProto]) -> None:
    """Alone between two letters; half of the planes beyond the first are sampled."""
    fast, definition = GigatokenEncoder(models["llama"]), Definition(models["llama"])
    codes = [*range(0xD800), *range(0xE000, 0x10000), *range(0x10000, 0x110000, 13)]
    texts = ["".join(f"a{chr(code)}b" for code in codes[at : at + 1000]) for at in range(0, len(codes), 1000)]
    assert rows(fast, texts) == [definition.ids(text) for text in texts]


def invented_model(base: ModelProto, seed: int) -> tuple[ModelProto, list[str]]:
    """Pieces and scores that no training would give, of so few characters that they overlap, and texts."""
    rng = random.Random(seed)
    alphabet = rng.choice(["ab\u2581", "a\u2581", ".,a\u2581", "a\u65e5\u2581", "ab.!\u2581"])
    longest = rng.choice([2, 3, 6])
    pieces = {"".join(rng.choices(alphabet, k=rng.randint(2, longest))) for _ in range(rng.randint(3, 60))}
    repeated = rng.choice(alphabet)
    if seed % 2:
        pieces = {piece for piece in pieces if 2 * repeated not in piece}
    # Lengths with gaps, as trained models have them.
    runs = [repeated * length for length in rng.sample(range(2, 12), rng.randint(2, 8))] if seed % 2 else []
    ordered = sorted(pieces, key=lambda piece: rng.random())
    scores = {piece: -float(rank) for rank, piece in enumerate(ordered)} | dict.fromkeys(runs, -1e9)
    model = copy(base)
    del model.pieces[259:]
    model.normalizer_spec.add_dummy_prefix = rng.random() < 0.8
    for piece in sorted([*scores, *alphabet], key=lambda piece: rng.random()):
        model.pieces.add(piece=piece, score=scores.get(piece, 0.0), type=ModelProto.SentencePiece.NORMAL)
    texts = ["".join(rng.choices(alphabet + " z", k=rng.choice([3, 10, 40, 300]))) for _ in range(60)]
    return model, texts


def test_invented_models(models: dict[str, ModelProto], tmp_path: Path) -> None:
    for seed in range(40):
        model, texts = invented_model(models["few pieces"], seed)
        encoder = load_encoder("gigatoken", saved(model, tmp_path))
        assert encoder.name == "gigatoken"
        definition = Definition(model)
        assert rows(encoder, texts) == [definition.ids(text) for text in texts], f"seed {seed}"


def scored(model: ModelProto, scores: dict[str, float]) -> ModelProto:
    changed = with_pieces(model, ALPHA, BETA, *scores)
    for piece in changed.pieces:
        piece.score = scores.get(piece.piece, piece.score)
    return changed


def specified(model: ModelProto, spec: str, **fields: Any) -> ModelProto:
    changed = copy(model)
    for field, value in fields.items():
        setattr(getattr(changed, spec), field, value)
    return changed


def normalizing(model: ModelProto) -> ModelProto:
    charsmap = train(["fine"], vocab_size=265, normalization_rule_name="nfkc").normalizer_spec
    return specified(model, "normalizer_spec", precompiled_charsmap=charsmap.precompiled_charsmap)


def without_bytes(model: ModelProto) -> ModelProto:
    changed = specified(model, "trainer_spec", byte_fallback=False)
    kept = [piece for piece in model.pieces if piece.type != piece.BYTE]
    del changed.pieces[:]
    changed.pieces.extend(kept)
    return changed


# What gigatoken does otherwise: the reason that is given, a model, a text that shows it.
NO_ORDER = "has scores that leave the order of the merges open"
DIFFERENCES: dict[str, tuple[str, Callable[[ModelProto], ModelProto], str]] = {
    "unigram": (
        "is not a BPE model",
        lambda model: specified(model, "trainer_spec", model_type=TrainerSpec.UNIGRAM),
        "there is a function here",
    ),
    "unknown pieces": ("has no byte fallback", without_bytes, ALPHA),
    "compatibility characters": ("normalizes text", normalizing, "\ufb01"),
    "spaces removed": (
        "removes extra spaces",
        lambda model: specified(model, "normalizer_spec", remove_extra_whitespaces=True),
        "a  b",
    ),
    "spaces kept": (
        "does not mark spaces",
        lambda model: specified(model, "normalizer_spec", escape_whitespaces=False),
        "a b",
    ),
    "spaces after words": (
        "marks spaces at the end of a word",
        lambda model: specified(model, "trainer_spec", treat_whitespace_as_suffix=True),
        "a b",
    ),
    "user-defined": (
        "has user-defined pieces",
        lambda model: typed(model, ModelProto.SentencePiece.USER_DEFINED, ALPHA + BETA),
        ALPHA + BETA,
    ),
    "unused": (
        "has unused pieces",
        lambda model: typed(model, ModelProto.SentencePiece.UNUSED, ALPHA + BETA, ALPHA + BETA + GAMMA),
        ALPHA + BETA + GAMMA,
    ),
    "pieces of one score": (
        NO_ORDER,
        lambda model: scored(model, {ALPHA + BETA: -1e9, BETA + ALPHA: -1e9}),
        BETA + ALPHA + BETA,
    ),
    "runs of two scores": (
        NO_ORDER,
        lambda model: scored(model, {n * ALPHA: -1e9 if n < 4 else -2e9 for n in range(2, 6)}),
        8 * ALPHA + BETA,
    ),
    "runs inside another piece": (
        NO_ORDER,
        lambda model: scored(model, {2 * ALPHA: -1e9, 3 * ALPHA: -1e9, 2 * ALPHA + BETA: -1.5}),
        3 * ALPHA + BETA,
    ),
    "no score": (
        NO_ORDER,
        lambda model: scored(model, {ALPHA + BETA: math.nan}),
        ALPHA + BETA,
    ),
    "a character that is no piece": (
        "has pieces with a character that is no piece",
        lambda model: with_pieces(model, ALPHA + BETA),
        ALPHA + BETA,
    ),
    "a piece like a byte": (
        "has a piece that spells a byte",
        lambda model: with_pieces(model, *"<0xab>", *starts("<0xab>")),
        "<0xab>",
    ),
}


@pytest.mark.parametrize("difference", DIFFERENCES)
def test_fallback_to_sentencepiece_where_gigatoken_differs(
    difference: str, models: dict[str, ModelProto], tmp_path: Path
) -> None:
    reason, change, text = DIFFERENCES[difference]
    model = change(models["llama"])
    encoder = load_encoder("gigatoken", saved(model, tmp_path))
    assert (encoder.name, encoder.fallback_reason) == ("sentencepiece", f"the tokenizer model {reason}")
    texts = [text, *TEXTS.values()]
    assert rows(encoder, texts) == [Definition(model).ids(text) for text in texts]


def test_splitting_changes_no_tokens(models: dict[str, ModelProto], documents: list[str]) -> None:
    """Parts of 50 characters, where 4 million is the rule; each text alone, and with others."""
    texts = [text[:400] for text in (*TEXTS.values(), *documents[::20])]
    for model in models.values():
        definition = Definition(model)
        expected = [definition.ids(text) for text in texts]
        for encoder in (GigatokenEncoder(model, 50), SentencePieceEncoder(model, chunk_characters=50)):
            assert rows(encoder, texts) == expected
            assert [rows(encoder, [text])[0] for text in texts[:5]] == expected[:5]


def test_splitting_where_no_piece_reaches_across(models: dict[str, ModelProto], documents: list[str]) -> None:
    text = "".join(documents)[:100_000]
    splitter = TextSplitter(models["llama"], chunk_characters=1000)
    parts = list(splitter.split(text))
    assert "".join(parts) == text
    assert max(map(len, parts)) < 1100
    spaces = "x" * 500 + " " * 1500 + "\n"
    assert [len(part) for part in splitter.split(spaces)] == [2000, 1]
    assert list(splitter.split("")) == [""]


def test_gigatoken_gets_batches_of_a_chunk(
    models: dict[str, ModelProto], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches have at most 50 characters, except for a text that is longer."""
    batches: list[list[int]] = []

    class Recorded(SimpleNamespace):
        @staticmethod
        def from_json(text: str, of_gigatoken: Any = gigatoken.Tokenizer) -> "Recorded":
            return Recorded(tokenizer=of_gigatoken.from_json(text))

        def encode_batch(self, texts: list[str], **more: Any) -> Any:
            batches.append([len(text) for text in texts])
            return self.tokenizer.encode_batch(texts, **more)

    monkeypatch.setattr(gigatoken, "Tokenizer", Recorded)
    lengths = (30, 30, 20, 60, 1, 49, 1)
    rows(GigatokenEncoder(models["llama"], chunk_characters=50), ["x" * length for length in lengths])
    first, second, *cut, last_but_one, last = batches
    assert [first, second, last_but_one, last] == [[30], [30, 20], [1, 49], [1]]
    assert sum(length for (length,) in cut) == 60


def test_splitting_is_left_out_for_models_that_remove_spaces(models: dict[str, ModelProto]) -> None:
    _, change, _ = DIFFERENCES["spaces removed"]
    model = change(models["llama"])
    text = f"a {ALPHA}"
    encoder = SentencePieceEncoder(model, chunk_characters=2)
    assert rows(encoder, [text]) == [Definition(model).ids(text)]


def test_sentencepiece_is_the_definition(models: dict[str, ModelProto], tmp_path: Path) -> None:
    encoder = load_encoder("sentencepiece", saved(models["llama"], tmp_path))
    definition = Definition(models["llama"])
    assert (encoder.name, encoder.fallback_reason) == ("sentencepiece", None)
    assert rows(encoder, list(TEXTS.values())) == [definition.ids(text) for text in TEXTS.values()]


@pytest.mark.parametrize("name", ["gigatoken", "sentencepiece"])
@pytest.mark.parametrize("texts", [[], [""], ["", "", ""], ["", "a", ""]])
def test_empty_texts_have_no_ids(name: Any, texts: list[str], tokenizer_model: Path) -> None:
    lengths = [len(row) for row in rows(load_encoder(name, tokenizer_model), texts)]
    assert [bool(length) for length in lengths] == [bool(text) for text in texts]


def test_threads_share_an_encoder(fast: Encoder, definition: Definition, documents: list[str]) -> None:
    texts = documents[:40]
    expected = [definition.ids(text) for text in texts]
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(lambda _: rows(fast, texts), range(4))) == [expected] * 4


def test_memory_does_not_grow(tokenizer_model: Path) -> None:
    """32 MB of words that never come again: a cache that kept them would grow by 300 MB."""
    encoder = load_encoder("gigatoken", tokenizer_model)
    rng = np.random.default_rng(0)
    resident = []
    for _ in range(8):
        words = rng.integers(ord("a"), ord("z"), (500_000, 8), dtype=np.uint8)
        words[:, 0] = ord(" ")
        encoder.encode([words.tobytes().decode()])
        resident.append(psutil.Process().memory_info().rss)
    assert min(resident[-2:]) < resident[1] + 100e6


def test_self_check_names_the_first_text_that_differs(models: dict[str, ModelProto]) -> None:
    encoder = GigatokenEncoder(models["llama"])
    other = with_pieces(models["llama"], ALPHA, BETA, ALPHA + BETA)
    texts = ["", "the same", f"not {ALPHA}{BETA} the same " * 9, ALPHA]
    self_check(encoder, SentencePieceEncoder(models["llama"]), texts)
    with refused(DataError, "--encoder", "gigatoken") as error:
        self_check(encoder, SentencePieceEncoder(other), texts)
    assert f"'not {ALPHA}{BETA} the same not" in str(error.value)
    assert "--encoder sentencepiece" in error.value.problems[0].remedy
    assert len(str(error.value)) < 250


@pytest.mark.parametrize("name", ["gigatoken", "sentencepiece"])
def test_a_model_that_is_missing_or_none(name: Any, tmp_path: Path) -> None:
    with refused(MissingInputError, "tokenizer", tmp_path / "no.model"):
        load_encoder(name, tmp_path / "no.model")
    (tmp_path / "bad.model").write_bytes(b"hello world")
    with refused(DataError, "tokenizer", tmp_path / "bad.model"):
        load_encoder(name, tmp_path / "bad.model")
