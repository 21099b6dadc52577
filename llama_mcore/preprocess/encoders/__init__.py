"""Encoders of many texts at a time: sentencepiece, which defines the tokens, and gigatoken, which is fast.

Both give the same ids for every str; `gigatoken.py` says why, and for which models.
"""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from sentencepiece import SentencePieceProcessor
from sentencepiece.sentencepiece_model_pb2 import ModelProto

from llama_mcore.data.tokenizer import Tokenizer
from llama_mcore.errors import DataError, Problem
from llama_mcore.preprocess.encoders.gigatoken import GigatokenEncoder, why_not_gigatoken
from llama_mcore.preprocess.encoders.text_split import CHUNK_CHARACTERS, TextSplitter
from llama_mcore.preprocess.options import EncoderName

_QUOTED_CHARACTERS = 60


class Encoder(Protocol):
    """Encoder on the calling thread. gigatoken's releases the GIL, so that several threads can share one."""

    @property
    def name(self) -> EncoderName:
        """The encoder in use; not always the one requested."""

    @property
    def fallback_reason(self) -> str | None:
        """The reason why sentencepiece is in use although gigatoken was requested."""

    def encode(self, texts: Sequence[str]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Ids of all texts one after the other, and the number of ids of each text.

        Neither BOS nor EOS; no ids for the empty text. Texts hold no lone surrogates. A call costs some
        milliseconds beside the texts: give it a megabyte or more.
        """


def load_encoder(name: EncoderName, tokenizer_model: Path) -> Encoder:
    """The encoder of a SentencePiece model: sentencepiece where gigatoken would give other tokens.

    Raises MissingInputError where there is no such file, DataError where it is not a SentencePiece model.
    """
    model = ModelProto.FromString(Tokenizer(tokenizer_model).model)
    if name == "sentencepiece":
        return SentencePieceEncoder(model)
    if reason := why_not_gigatoken(model):
        return SentencePieceEncoder(model, fallback_reason=reason)
    return GigatokenEncoder(model)


def self_check(encoder: Encoder, definition: Encoder, texts: Sequence[str]) -> None:
    """Raise DataError with the first of `texts` for which the two give different ids."""
    ids, lengths = encoder.encode(texts)
    expected_ids, expected_lengths = definition.encode(texts)
    if np.array_equal(lengths, expected_lengths) and np.array_equal(ids, expected_ids):
        return
    ends, expected_ends = np.cumsum(lengths)[:-1], np.cumsum(expected_lengths)[:-1]
    rows = zip(texts, np.split(ids, ends), np.split(expected_ids, expected_ends), strict=True)
    text = next(text for text, row, expected in rows if not np.array_equal(row, expected))
    start = repr(text[:_QUOTED_CHARACTERS])
    reason = f"gives other tokens than {definition.name} for the text that starts with {start}"
    raise DataError(Problem("--encoder", encoder.name, reason, f"use --encoder {definition.name}"))


class SentencePieceEncoder:
    """Encoder by sentencepiece. It splits long texts, since it takes 50 bytes of memory for each of text."""

    name: EncoderName = "sentencepiece"

    def __init__(
        self,
        model: ModelProto,
        fallback_reason: str | None = None,
        chunk_characters: int = CHUNK_CHARACTERS,
    ) -> None:
        self.fallback_reason = fallback_reason
        self._model, self._chunk_characters = model, chunk_characters
        self._first = _processor(model, add_dummy_prefix=model.normalizer_spec.add_dummy_prefix)

    # Needed for long texts alone, and slow to make.
    @cached_property
    def _splitter(self) -> TextSplitter | None:
        """None for a model whose texts cannot be split."""
        return None if why_not_gigatoken(self._model) else TextSplitter(self._model, self._chunk_characters)

    @cached_property
    def _later(self) -> SentencePieceProcessor:
        return _processor(self._model, add_dummy_prefix=False)

    def encode(self, texts: Sequence[str]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        encoded = [self._encode(text) for text in texts]
        lengths = np.array([len(ids) for ids in encoded], dtype=np.int32)
        return np.concatenate([np.empty(0, dtype=np.int32), *encoded]), lengths

    def _encode(self, text: str) -> NDArray[np.int32]:
        if len(text) <= self._chunk_characters or self._splitter is None:
            return np.array(self._first.encode(text), dtype=np.int32)
        chunks = self._splitter.split(text)
        encoded = [np.array(self._first.encode(next(chunks)), dtype=np.int32)]
        encoded += [np.array(self._later.encode(chunk), dtype=np.int32) for chunk in chunks]
        return np.concatenate(encoded)


def _processor(model: ModelProto, *, add_dummy_prefix: bool) -> SentencePieceProcessor:
    changed = ModelProto()
    changed.CopyFrom(model)
    changed.normalizer_spec.add_dummy_prefix = add_dummy_prefix
    processor = SentencePieceProcessor()
    processor.LoadFromSerializedProto(changed.SerializeToString())
    return processor
