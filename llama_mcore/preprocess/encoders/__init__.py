"""Texts to token ids, many at a time: by sentencepiece, which defines the tokens; or by gigatoken, fast.

Both give the same ids for every str; `gigatoken.py` says why, and for which models.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from sentencepiece import SentencePieceProcessor
from sentencepiece.sentencepiece_model_pb2 import ModelProto

from llama_mcore.data.tokenizer import Tokenizer
from llama_mcore.errors import DataError, Problem
from llama_mcore.preprocess.encoders.gigatoken import GigatokenEncoder, why_not_gigatoken
from llama_mcore.preprocess.encoders.text_split import PART_CHARACTERS, TextCutter

EncoderName = Literal["gigatoken", "sentencepiece"]

_QUOTED_CHARACTERS = 60


class Encoder(Protocol):
    """Works on the calling thread. gigatoken's releases the GIL, so that several threads can share one."""

    @property
    def name(self) -> EncoderName:
        """What does the work; not always what was asked for."""

    @property
    def fallback_reason(self) -> str | None:
        """Why sentencepiece does the work although gigatoken was asked for."""

    def encode(self, texts: Sequence[str]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Ids of all texts one after the other, and how many each text has.

        Neither BOS nor EOS; no ids for the empty text. Texts hold no lone surrogates. A call costs some
        milliseconds beside the texts: give it a megabyte or more.
        """


def load_encoder(name: EncoderName, tokenizer_model: Path) -> Encoder:
    """The encoder of a SentencePiece model: sentencepiece where gigatoken would give other tokens.

    MissingInputError, DataError: there is no such file, or it is no SentencePiece model.
    """
    model = ModelProto.FromString(Tokenizer(tokenizer_model).model)
    if name == "sentencepiece":
        return SentencePieceEncoder(model)
    if reason := why_not_gigatoken(model):
        return SentencePieceEncoder(model, fallback_reason=reason)
    return GigatokenEncoder(model)


def self_check(encoder: Encoder, definition: Encoder, texts: Sequence[str]) -> None:
    """DataError that names the first of `texts` for which the two give different ids."""
    ids, lengths = encoder.encode(texts)
    expected_ids, expected_lengths = definition.encode(texts)
    if np.array_equal(lengths, expected_lengths) and np.array_equal(ids, expected_ids):
        return
    ends, expected_ends = np.cumsum(lengths)[:-1], np.cumsum(expected_lengths)[:-1]
    rows = zip(texts, np.split(ids, ends), np.split(expected_ids, expected_ends), strict=True)
    text = next(text for text, row, expected in rows if not np.array_equal(row, expected))
    start = repr(text[:_QUOTED_CHARACTERS])
    reason = f"gives other tokens than {definition.name} for the text that starts with {start}"
    raise DataError(Problem("encoder", encoder.name, reason, f"use --encoder {definition.name}"))


class SentencePieceEncoder:
    """Long texts of models that allow it are cut: sentencepiece needs 50 bytes of memory for each of text."""

    name: EncoderName = "sentencepiece"

    def __init__(
        self,
        model: ModelProto,
        fallback_reason: str | None = None,
        part_characters: int = PART_CHARACTERS,
    ) -> None:
        self.fallback_reason = fallback_reason
        self._cutter = None if why_not_gigatoken(model) else TextCutter(model, part_characters)
        self._first = _processor(model, add_dummy_prefix=model.normalizer_spec.add_dummy_prefix)
        self._later = _processor(model, add_dummy_prefix=False)

    def encode(self, texts: Sequence[str]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        encoded = [self._encode(text) for text in texts]
        lengths = np.array([len(ids) for ids in encoded], dtype=np.int32)
        return np.concatenate([np.empty(0, dtype=np.int32), *encoded]), lengths

    def _encode(self, text: str) -> NDArray[np.int32]:
        parts = self._cutter.cut(text) if self._cutter else iter([text])
        encoded = [np.array(self._first.encode(next(parts)), dtype=np.int32)]
        encoded += [np.array(self._later.encode(part), dtype=np.int32) for part in parts]
        return np.concatenate(encoded)


def _processor(model: ModelProto, *, add_dummy_prefix: bool) -> SentencePieceProcessor:
    changed = ModelProto()
    changed.CopyFrom(model)
    changed.normalizer_spec.add_dummy_prefix = add_dummy_prefix
    processor = SentencePieceProcessor()
    processor.LoadFromSerializedProto(changed.SerializeToString())
    return processor
