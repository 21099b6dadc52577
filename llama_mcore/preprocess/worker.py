"""Worker of a preprocessing job: encodes units into parts, splits off validation, shuffles."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import orjson
from numpy.typing import NDArray

from llama_mcore.preprocess.encoders import load_encoder, self_check
from llama_mcore.preprocess.inputs import Unit
from llama_mcore.preprocess.options import EncodeSpec
from llama_mcore.preprocess.part_store import OutputCounts, Part, PartRecord
from llama_mcore.preprocess.readers import make_reader, payload_reader
from llama_mcore.preprocess.readers.interface import BATCH_BYTES, BadLine, Batch, Reader, bad_line_error
from llama_mcore.preprocess.readers.jsonl import lines_before

_CHECKED_CHARACTERS = 50_000
"""Characters at the start of each worker's input that sentencepiece encodes too, to compare."""


@dataclass
class _Output:
    """Documents of a part that is being made, for one output."""

    tokens: list[NDArray[np.integer]] = field(default_factory=list)
    lengths: list[NDArray[np.int32]] = field(default_factory=list)
    text_bytes: int = 0


@dataclass
class _Counts:
    documents: int = 0
    empty: list[int] = field(default_factory=list)
    skipped: int = 0
    lines: int = 0


class UnitEncoder:
    """Encodes units. It keeps the reader of the last group, from which the next unit often comes too."""

    def __init__(self, spec: EncodeSpec) -> None:
        self._spec = spec
        self._encoder = load_encoder(spec.encoder, spec.tokenizer_model)
        self._checked = self._encoder.name == "sentencepiece"
        self._reader: Reader | None = None
        self._group = -1

    def __call__(self, unit: Unit) -> tuple[PartRecord, str | None]:
        """Write the part of a unit; return its record, and why the encoder is not the one requested."""
        spec = self._spec
        outputs = [_Output() for _ in range(len(spec.keys) * spec.outputs_per_key)]
        counts = _Counts(empty=[0 for _ in spec.keys])
        skipped_lines: list[bytes] = []
        reader = self._reader_for(unit)
        for batch in reader.read(unit.index if unit.payload is None else 0):
            counts.documents += len(batch.texts[0]) + len(batch.bad)
            counts.skipped += len(batch.bad)
            counts.lines += batch.lines
            skipped_lines += [self._skip(unit, bad) for bad in batch.bad]
            self._encode(batch, outputs, counts)
        tokens = [_joined(output.tokens, spec.dtype) for output in outputs]
        lengths = [_joined(output.lengths, np.int32) for output in outputs]
        if spec.shuffle_seed is not None:
            shuffled = [shuffle(*pair, spec.shuffle_seed, unit) for pair in zip(tokens, lengths, strict=True)]
            tokens, lengths = [pair[0] for pair in shuffled], [pair[1] for pair in shuffled]
        record = spec.parts.write(
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
            input_bytes=reader.bytes_read,
            ended=reader.ended,
        )
        return record, self._encoder.fallback_reason

    def _reader_for(self, unit: Unit) -> Reader:
        spec, group = self._spec, self._spec.groups[unit.group]
        if unit.payload is not None:
            return payload_reader(group.path, unit.payload, spec.keys)
        if self._reader is None or self._group != unit.group:
            if self._reader:
                self._reader.close()
            self._reader, self._group = make_reader(group, spec.keys, spec.unit_bytes), unit.group
        return self._reader

    def _skip(self, unit: Unit, bad: BadLine) -> bytes:
        """The entry of a bad line in the quarantine file; raises its error if bad lines are not skipped."""
        if self._spec.on_bad_line == "fail":
            raise self._bad_line_error(unit, bad)
        entry = {"file": str(bad.path), "line": bad.line, "reason": bad.reason, "start": bad.start}
        return orjson.dumps(entry) + b"\n"

    def _bad_line_error(self, unit: Unit, bad: BadLine) -> Exception:
        group = self._spec.groups[unit.group]
        number = bad.line
        if number is not None:
            number += 1
            if unit.lines_before is not None:
                number += unit.lines_before
            elif group.format != "parquet":
                number += lines_before(group, unit.index * self._spec.unit_bytes)
        return bad_line_error(bad, number, "fix it, or skip bad lines with --on-bad-line skip")

    def _encode(self, batch: Batch, outputs: list[_Output], counts: _Counts) -> None:
        spec = self._spec
        for key, texts in enumerate(batch.texts):
            if not texts:
                continue
            self._compare_with_sentencepiece(texts)
            sizes = np.array([utf8_size(text) for text in texts], dtype=np.int64)
            ids, lengths = self._encoder.encode(texts)
            counts.empty[key] += len(texts) - int(np.count_nonzero(lengths))
            validation = are_for_validation(texts, spec.validation_split) & (lengths > 0)
            texts.clear()  # the memory is needed for the tokens
            self._refuse_outside(ids)
            if not spec.validation_split:
                self._add(outputs[key], ids, lengths, sizes)
                continue
            of_validation = np.repeat(validation, lengths)
            self._add(outputs[2 * key], ids[~of_validation], lengths[~validation], sizes[~validation])
            self._add(outputs[2 * key + 1], ids[of_validation], lengths[validation], sizes[validation])

    def _compare_with_sentencepiece(self, texts: Sequence[str]) -> None:
        """Check gigatoken on the first texts that this worker meets."""
        if self._checked:
            return
        self._checked = True
        sample, left = [], _CHECKED_CHARACTERS
        for text in texts:
            sample.append(text[:left])
            left -= len(sample[-1])
            if not left:
                break
        self_check(self._encoder, load_encoder("sentencepiece", self._spec.tokenizer_model), sample)

    def _refuse_outside(self, ids: NDArray[np.int32]) -> None:
        if len(ids) and not 0 <= ids.min() <= ids.max() < self._spec.vocab_size:
            raise ValueError(f"the encoder gave an id outside [0, {self._spec.vocab_size})")

    def _add(
        self, output: _Output, ids: NDArray[np.int32], lengths: NDArray[np.int32], sizes: NDArray[np.int64]
    ) -> None:
        spec = self._spec
        tokens, closed = close_documents(ids, lengths, spec.bos, spec.eod, spec.dtype)
        output.tokens.append(tokens)
        output.lengths.append(closed)
        output.text_bytes += int(sizes.sum())


def utf8_size(text: str) -> int:
    """Bytes of the text as UTF-8, without a second copy of it all."""
    if text.isascii():
        return len(text)
    return sum(len(text[start : start + BATCH_BYTES].encode()) for start in range(0, len(text), BATCH_BYTES))


def are_for_validation(texts: Sequence[str], ratio: float) -> NDArray[np.bool_]:
    """Documents to set aside, chosen by their text alone: the rest of the corpus does not matter."""
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
    """The documents with BOS before and EOD after each, if these are given; empty ones are left out."""
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
    """The documents in an order that follows from the seed and the place of the unit in the input."""
    generator = np.random.Philox(key=seed, counter=[0, 0, unit.group, unit.index])
    # Philox's raw numbers are the same in every version of numpy; those of `permutation` need not be.
    order = np.argsort(generator.random_raw(len(lengths)), kind="stable")
    ends = np.cumsum(lengths, dtype=np.int64)
    documents = [tokens[ends[i] - lengths[i] : ends[i]] for i in order]
    return _joined(documents, tokens.dtype.type), lengths[order]


def _joined(arrays: Sequence[NDArray[np.integer]], dtype: type[np.integer]) -> NDArray[np.integer]:
    return arrays[0] if len(arrays) == 1 else np.concatenate([np.empty(0, dtype), *arrays])
