"""gigatoken with a model converted here, so that its tokens are sentencepiece's for every text.

gigatoken's own reader of SentencePiece models is not used: it makes <s> in a text the control token and puts
a space after it, lets merges end in control and byte tokens, and strips and normalizes in a way of its own.

Why the ids are the same. SentencePiece's BPE joins, of all neighbouring symbols whose text is a piece, those
of the highest score, the leftmost first. Joins inside a stretch of text depend on that stretch alone, as long
as nothing joins across its ends, so a piece always comes about from the same two halves. gigatoken ranks
pairs of halves instead of pieces. As every piece has a score of its own (`_scores_give_an_order` has the one
exception), and halves that never meet cannot matter, the order of the joins is the same. `why_not_gigatoken`
checks what this rests on.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cached_property
from math import isfinite

import awkward as ak
import gigatoken
import numpy as np
from numpy.typing import NDArray
from sentencepiece.sentencepiece_model_pb2 import ModelProto, TrainerSpec

from llama_mcore.preprocess.encoders.text_split import CHUNK_CHARACTERS, SPACE_MARK, TextSplitter
from llama_mcore.preprocess.options import EncoderName


def why_not_gigatoken(model: ModelProto) -> str | None:
    """The property of a SentencePiece model with which gigatoken would give other tokens; None if none."""
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    normal = [piece for piece in model.pieces if piece.type == piece.NORMAL]
    single = {piece.piece for piece in normal if len(piece.piece) == 1}
    scores = {piece.piece: piece.score for piece in normal if len(piece.piece) > 1}
    obstacles = {
        "is not a BPE model": trainer.model_type != TrainerSpec.BPE,
        "has no byte fallback": not trainer.byte_fallback,
        "normalizes text": bool(normalizer.precompiled_charsmap),
        "removes extra spaces": normalizer.remove_extra_whitespaces,
        "does not mark spaces": not normalizer.escape_whitespaces,
        "marks spaces at the end of a word": trainer.treat_whitespace_as_suffix,
        "has user-defined pieces": any(piece.type == piece.USER_DEFINED for piece in model.pieces),
        "has unused pieces": any(piece.type == piece.UNUSED for piece in model.pieces),
        "has scores that leave the order of the merges open": not _scores_give_an_order(scores),
        "has pieces with a character that is no piece": any(set(piece) - single for piece in scores),
        "has a piece that spells a byte": any(_spells_a_byte(piece.piece) for piece in normal),
    }
    return next((f"the tokenizer model {obstacle}" for obstacle, found in obstacles.items() if found), None)


def _scores_give_an_order(scores: dict[str, float]) -> bool:
    """True if no two pieces share a score, apart from runs of one character that all share one.

    The released LLaMA tokenizer has such runs, two to sixteen spaces, and ours have those that its text made.
    sentencepiece joins the leftmost pair of equals; `_merges` comes to the same by ranking the pair with the
    longer left half higher: the leftmost run grows before the next one begins.
    """
    count = Counter(scores.values())
    tied = {piece for piece, score in scores.items() if count[score] > 1}
    if not all(map(isfinite, count)):
        return False
    if not tied:
        return True
    character = min(tied)[0]
    all_runs = all(set(piece) == {character} for piece in tied)
    in_others = any(2 * character in piece for piece in scores.keys() - tied)
    return all_runs and len({scores[piece] for piece in tied}) == 1 and not in_others


def _spells_a_byte(piece: str) -> bool:
    """True for <0xab>, which gigatoken takes for a byte; SentencePiece writes bytes in capitals."""
    return len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">")


class GigatokenEncoder:
    """Encoder without state between calls: gigatoken's caches last for one batch, so they cannot grow."""

    name: EncoderName = "gigatoken"
    fallback_reason: str | None = None

    def __init__(self, model: ModelProto, chunk_characters: int = CHUNK_CHARACTERS) -> None:
        self._model, self._chunk_characters = model, chunk_characters
        prefix = model.normalizer_spec.add_dummy_prefix
        self._first = gigatoken.Tokenizer.from_json(_tokenizer_json(model, add_dummy_prefix=prefix))

    @cached_property
    def _splitter(self) -> TextSplitter:
        return TextSplitter(self._model, self._chunk_characters)

    @cached_property
    def _later(self) -> gigatoken.Tokenizer:
        return gigatoken.Tokenizer.from_json(_tokenizer_json(self._model, add_dummy_prefix=False))

    def encode(self, texts: Sequence[str]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        if sum(map(len, texts)) <= self._chunk_characters:
            return _encode(self._first, list(texts))
        batches = [self._encode_batch(batch) for batch in self._batches(texts)]
        return np.concatenate([ids for ids, _ in batches]), np.concatenate(
            [lengths for _, lengths in batches]
        )

    def _batches(self, texts: Sequence[str]) -> Iterator[list[str]]:
        """Neighbouring texts that together are no longer than a chunk; a longer text comes alone."""
        batch: list[str] = []
        size = 0
        for text in texts:
            if batch and size + len(text) > self._chunk_characters:
                yield batch
                batch, size = [], 0
            batch.append(text)
            size += len(text)
        yield batch

    def _encode_batch(self, texts: list[str]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        if len(texts) > 1:
            return _encode(self._first, texts)
        chunks = self._splitter.split(texts[0])
        encoded = [_encode(self._first, [next(chunks)])[0]]
        encoded += [_encode(self._later, [chunk])[0] for chunk in chunks]
        ids = np.concatenate(encoded)
        return ids, np.array([len(ids)], dtype=np.int32)


def _encode(tokenizer: gigatoken.Tokenizer, texts: list[str]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    rows = tokenizer.encode_batch(texts, parallel=False)
    ids = ak.to_numpy(ak.flatten(rows, axis=1))
    return ids.view(np.int32), ak.to_numpy(ak.num(rows)).astype(np.int32)


def _tokenizer_json(model: ModelProto, *, add_dummy_prefix: bool) -> str:
    """The model as Hugging Face's tokenizer.json, without control and unknown tokens: no text spells them."""
    ids = {
        piece.piece: number
        for number, piece in enumerate(model.pieces)
        if piece.type in (piece.NORMAL, piece.BYTE)
    }
    normalizers = [{"type": "Replace", "pattern": {"String": " "}, "content": SPACE_MARK}]
    if add_dummy_prefix:
        normalizers.insert(0, {"type": "Prepend", "prepend": SPACE_MARK})
    return json.dumps(
        {
            "version": "1.0",
            "added_tokens": [],
            "normalizer": {"type": "Sequence", "normalizers": normalizers},
            "pre_tokenizer": None,
            "model": {"type": "BPE", "byte_fallback": True, "vocab": ids, "merges": _merges(model)},
        }
    )


def _merges(model: ModelProto) -> list[tuple[str, str]]:
    """Pairs of halves of every piece, at every split: best score first, then the longer left half."""
    normal = [piece for piece in model.pieces if piece.type == piece.NORMAL]
    names = {piece.piece for piece in normal}
    ranked = [
        (-piece.score, -i, piece.piece[:i], piece.piece[i:])
        for piece in normal
        for i in range(1, len(piece.piece))
        if piece.piece[:i] in names and piece.piece[i:] in names
    ]
    return [(left, right) for *_, left, right in sorted(ranked)]
