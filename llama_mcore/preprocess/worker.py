"""What a worker does: a unit of input becomes a part, its documents encoded, closed, split and shuffled."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import orjson
from numpy.typing import NDArray

from llama_mcore.data.tokenizer import Tokenizer
from llama_mcore.preprocess.encoders import load_encoder, self_check
from llama_mcore.preprocess.inputs import Unit
from llama_mcore.preprocess.job import Job
from llama_mcore.preprocess.part_store import OutputCounts, Part, PartRecord
from llama_mcore.preprocess.readers import make_reader, payload_reader
from llama_mcore.preprocess.readers.blocks import BLOCK_BYTES, BadLine, Block, Reader, bad_line_error
from llama_mcore.preprocess.readers.lines import lines_before

_CHECKED_CHARACTERS = 50_000
"""Of the first texts that a worker meets, encoded by sentencepiece too."""


@dataclass
class _Output:
    """Documents on their way into a part."""

    tokens: list[NDArray[np.integer]] = field(default_factory=list)
    lengths: list[NDArray[np.int32]] = field(default_factory=list)
    text_bytes: int = 0


@dataclass
class _Counts:
    documents: int = 0
    empty: list[int] = field(default_factory=list)
    skipped: int = 0
    lines: int = 0


class Definition:
    """Plain sentencepiece, for little text: it is there sooner than the encoder built on it."""

    name: Literal["sentencepiece"] = "sentencepiece"
    fallback_reason = None

    def __init__(self, tokenizer_model: Path) -> None:
        self._tokenizer = Tokenizer(tokenizer_model)

    def encode(self, texts: Sequence[str]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """As every Encoder's."""
        encoded = [np.array(self._tokenizer.encode(text), dtype=np.int32) for text in texts]
        lengths = np.array([len(ids) for ids in encoded], dtype=np.int32)
        return np.concatenate([np.empty(0, np.int32), *encoded]), lengths


class UnitEncoder:
    """Encodes units. The reader of the last source is kept: units of one source often follow each other."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._encoder = load_encoder(job.encoder, job.tokenizer_model)
        self._checked = self._encoder.name == "sentencepiece"
        self._reader: Reader | None = None
        self._source = -1

    def __call__(self, unit: Unit) -> tuple[PartRecord, str | None]:
        """The record of the part that was written, and why the encoder is not the one asked for."""
        return self._write(unit), self._encoder.fallback_reason

    def _write(self, unit: Unit) -> PartRecord:
        job = self._job
        outputs = [_Output() for _ in range(len(job.keys) * job.outputs_per_key)]
        counts = _Counts(empty=[0 for _ in job.keys])
        skipped_lines: list[bytes] = []
        reader = self._reader_for(unit)
        for block in reader.read(unit.cut if unit.payload is None else 0):
            self._count(block, counts)
            skipped_lines += [self._skip(unit, bad) for bad in block.bad]
            self._encode(block, outputs, counts)
        tokens = [_joined(output.tokens, job.dtype) for output in outputs]
        lengths = [_joined(output.lengths, np.int32) for output in outputs]
        if job.shuffle_seed is not None:
            shuffled = [shuffle(*pair, job.shuffle_seed, unit) for pair in zip(tokens, lengths, strict=True)]
            tokens, lengths = [pair[0] for pair in shuffled], [pair[1] for pair in shuffled]
        return job.parts.write(
            unit,
            Part(tokens, lengths, b"".join(skipped_lines)),
            outputs=[
                OutputCounts(
                    documents=len(lengths[index]),
                    tokens=len(tokens[index]),
                    text_bytes=output.text_bytes,
                    longest_document=int(lengths[index].max(initial=0)),
                )
                for index, output in enumerate(outputs)
            ],
            **vars(counts),
            input_bytes=reader.taken,
            ended=reader.ended,
        )

    def _reader_for(self, unit: Unit) -> Reader:
        job, source = self._job, self._job.sources[unit.source]
        if unit.payload is not None:
            return payload_reader(source.path, unit.payload, job.keys)
        if self._reader is None or self._source != unit.source:
            if self._reader:
                self._reader.close()
            self._reader, self._source = make_reader(source, job.keys, job.unit_bytes), unit.source
        return self._reader

    def _count(self, block: Block, counts: _Counts) -> None:
        counts.documents += len(block.texts[0]) + len(block.bad)
        counts.skipped += len(block.bad)
        counts.lines += block.lines

    def _skip(self, unit: Unit, bad: BadLine) -> bytes:
        """Its entry in the quarantine file, or the error that it is."""
        if self._job.on_bad_line == "fail":
            raise self._bad_line_error(unit, bad)
        entry = {"file": str(bad.path), "line": bad.line, "reason": bad.reason, "start": bad.start}
        return orjson.dumps(entry) + b"\n"

    def _bad_line_error(self, unit: Unit, bad: BadLine) -> Exception:
        source = self._job.sources[unit.source]
        number = bad.line
        if number is not None:
            number += 1
            if unit.lines_before is not None:
                number += unit.lines_before
            elif source.format != "parquet":
                number += lines_before(source, unit.cut * self._job.unit_bytes)
        return bad_line_error(bad, number)

    def _encode(self, block: Block, outputs: list[_Output], counts: _Counts) -> None:
        job = self._job
        for index, texts in enumerate(block.texts):
            if not texts:
                continue
            self._check(texts)
            sizes = np.array([utf8_size(text) for text in texts], dtype=np.int64)
            ids, lengths = self._encoder.encode(texts)
            counts.empty[index] += len(texts) - int(np.count_nonzero(lengths))
            validation = are_for_validation(texts, job.validation_split) & (lengths > 0)
            texts.clear()
            self._refuse_outside(ids)
            if not job.validation_split:
                self._add(outputs[index], ids, lengths, sizes)
                continue
            of_validation = np.repeat(validation, lengths)
            self._add(outputs[2 * index], ids[~of_validation], lengths[~validation], sizes[~validation])
            self._add(outputs[2 * index + 1], ids[of_validation], lengths[validation], sizes[validation])

    def _check(self, texts: Sequence[str]) -> None:
        """Compare with sentencepiece at the start of the real input."""
        if not self._checked:
            self._checked = True
            sample, left = [], _CHECKED_CHARACTERS
            for text in texts:
                sample.append(text[:left])
                left -= len(sample[-1])
                if not left:
                    break
            self_check(self._encoder, Definition(self._job.tokenizer_model), sample)

    def _refuse_outside(self, ids: NDArray[np.int32]) -> None:
        if len(ids) and not 0 <= ids.min() <= ids.max() < self._job.vocab_size:
            raise ValueError(f"the encoder gave an id outside [0, {self._job.vocab_size})")

    def _add(
        self, output: _Output, ids: NDArray[np.int32], lengths: NDArray[np.int32], sizes: NDArray[np.int64]
    ) -> None:
        tokens, closed = close_documents(ids, lengths, self._job.bos, self._job.eod, self._job.dtype)
        output.tokens.append(tokens)
        output.lengths.append(closed)
        output.text_bytes += int(sizes.sum())


def utf8_size(text: str) -> int:
    """Bytes of the text as UTF-8, without a second copy of it all."""
    if text.isascii():
        return len(text)
    pieces = (text[start : start + BLOCK_BYTES] for start in range(0, len(text), BLOCK_BYTES))
    return sum(len(piece.encode()) for piece in pieces)


def are_for_validation(texts: Sequence[str], ratio: float) -> NDArray[np.bool_]:
    """By the text alone: a document stays on its side whatever else the corpus holds."""
    if not ratio:
        return np.zeros(len(texts), dtype=np.bool_)
    limit = ratio * 2**64
    digests = (hashlib.sha256(text.encode()).digest() for text in texts)
    return np.array([int.from_bytes(digest[:8]) < limit for digest in digests], dtype=np.bool_)


def close_documents(
    ids: NDArray[np.int32],
    lengths: NDArray[np.int32],
    bos: int | None,
    eod: int | None,
    dtype: type[np.integer],
) -> tuple[NDArray[np.integer], NDArray[np.int32]]:
    """Documents with their first and last tokens, where there are such; empty ones are left out."""
    lengths = lengths[lengths > 0]
    extra = (bos is not None) + (eod is not None)
    if not extra:
        return ids.astype(dtype), lengths
    ends = np.cumsum(lengths + extra, dtype=np.int64)
    tokens = np.empty(len(ids) + extra * len(lengths), dtype=dtype)
    is_text = np.ones(len(tokens), dtype=np.bool_)
    if bos is not None:
        starts = ends - lengths - extra
        tokens[starts], is_text[starts] = bos, False
    if eod is not None:
        tokens[ends - 1], is_text[ends - 1] = eod, False
    tokens[is_text] = ids
    return tokens, lengths + np.int32(extra)


def shuffle(
    tokens: NDArray[np.integer], lengths: NDArray[np.integer], seed: int, unit: Unit
) -> tuple[NDArray[np.integer], NDArray[np.integer]]:
    """The documents in an order that follows from the seed and the place of the unit in the input.

    Philox's raw numbers are the same in every version of numpy; those of `permutation` need not be.
    """
    generator = np.random.Philox(key=seed, counter=[0, 0, unit.source, unit.cut])
    order = np.argsort(generator.random_raw(len(lengths)), kind="stable")
    ends = np.cumsum(lengths, dtype=np.int64)
    pieces = [tokens[ends[i] - lengths[i] : ends[i]] for i in order]
    return _joined(pieces, tokens.dtype.type), lengths[order]


def _joined(arrays: Sequence[NDArray[np.integer]], dtype: type[np.integer]) -> NDArray[np.integer]:
    return arrays[0] if len(arrays) == 1 else np.concatenate([np.empty(0, dtype), *arrays])
