"""Inspection of a dataset: its contents, and damage to its bytes."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llama_mcore import __version__
from llama_mcore.data.index import Index, idx_path
from llama_mcore.data.indexed_dataset import content_id
from llama_mcore.data.manifest import (
    DatasetManifest,
    build_manifest,
    manifest_path,
    read_manifest,
    write_manifest,
)
from llama_mcore.data.tokenizer import Tokenizer
from llama_mcore.data.verify import Damage, count_problems, damaged_blocks, index_problems, open_problems
from llama_mcore.errors import ConfigError, DataError, Problem
from llama_mcore.progress import ByteProgress

_SHOWN_TOKENS = 1000
_BAR_WIDTH = 40


@dataclass(frozen=True)
class Lengths:
    """Lengths of documents in tokens. `histogram` has rows (shortest, longest, documents)."""

    min: int
    median: int
    max: int
    histogram: list[tuple[int, int, int]]


@dataclass(frozen=True)
class ShownDocument:
    """Beginning of a document; `text` holds token ids if there is no tokenizer."""

    document: int
    tokens: int
    text: str


@dataclass(frozen=True)
class Inspection:
    """Everything that `inspect_dataset` prints."""

    prefix: str
    bin_bytes: int
    idx_bytes: int
    dtype: str
    documents: int
    tokens: int
    content_id: str
    manifest: dict[str, Any] | None
    """The manifest without the checksums."""
    document_lengths: Lengths
    verified: bool
    """True if all bytes were read."""
    vocab_size: int | None
    """Vocabulary size with which ids were compared, if all bytes were read."""
    damaged_blocks: list[Damage]
    problems: list[str]
    """Everything that is wrong, including the damaged blocks."""
    shown: list[ShownDocument]


def inspect_dataset(
    prefix: str,
    *,
    verify: bool = False,
    show: int = 0,
    start: int = 0,
    tokenizer_model: Path | None = None,
    add_manifest: bool = False,
    as_json: bool = False,
) -> None:
    """Print the contents; with `verify` read every byte. DataError, after printing, lists all damage."""
    tokenizer = Tokenizer(tokenizer_model, "--tokenizer-model") if tokenizer_model else None
    index, manifest = Index(prefix), read_manifest(prefix)
    _check_request(index, manifest, tokenizer, show=show, start=start, add_manifest=add_manifest)
    if add_manifest:
        manifest = _add_manifest(index, tokenizer)
    vocab_size = _vocab_size(manifest, tokenizer)
    problems, damage = (
        _verify(index, manifest, vocab_size) if verify else (open_problems(manifest, index), [])
    )
    inspection = Inspection(
        prefix=prefix,
        bin_bytes=index.num_bytes,
        idx_bytes=idx_path(prefix).stat().st_size,
        dtype=np.dtype(index.dtype).name,
        documents=index.num_documents,
        tokens=index.num_tokens,
        content_id=content_id(index, manifest),
        manifest=manifest.model_dump(exclude={"block_checksums"}) if manifest else None,
        document_lengths=_document_lengths(index),
        verified=verify,
        vocab_size=vocab_size,
        damaged_blocks=damage,
        problems=[str(problem) for problem in problems],
        shown=list(_shown(index, tokenizer, start, min(start + show, index.num_documents))),
    )
    print(_as_json(inspection) if as_json else "\n".join(_as_text(inspection)), flush=True)
    if problems:
        raise DataError(problems)


def _check_request(
    index: Index,
    manifest: DatasetManifest | None,
    tokenizer: Tokenizer | None,
    *,
    show: int,
    start: int,
    add_manifest: bool,
) -> None:
    if show and start >= index.num_documents:
        reason = f"must be below the number of documents, {index.num_documents:,}"
        raise ConfigError(Problem("--start", start, reason))
    if manifest and add_manifest:
        path = manifest_path(index.prefix)
        remedy = "check the dataset with --verify, or delete that file to trust the data as it is"
        raise ConfigError(Problem("--write-manifest", path, "exists already", remedy))
    if manifest and tokenizer and manifest.tokenizer_sha256 not in (None, tokenizer.sha256):
        reason = f"has SHA-256 {tokenizer.sha256}, but the dataset was made with {manifest.tokenizer_sha256}"
        raise DataError(
            Problem("--tokenizer-model", tokenizer.path, reason, "give the tokenizer of the dataset")
        )


def _vocab_size(manifest: DatasetManifest | None, tokenizer: Tokenizer | None) -> int | None:
    if manifest and manifest.vocab_size:
        return manifest.vocab_size
    return tokenizer.vocab_size if tokenizer else None


def _add_manifest(index: Index, tokenizer: Tokenizer | None) -> DatasetManifest:
    known: dict[str, Any] = {"versions": {"manifest added by llama_mcore": __version__}}
    if tokenizer:
        known |= {"tokenizer_sha256": tokenizer.sha256, "vocab_size": tokenizer.vocab_size}
    with _reading("write-manifest", index) as advance:
        manifest = build_manifest(index.prefix, advance, **known)
    write_manifest(index.prefix, manifest)
    return manifest


def _verify(
    index: Index, manifest: DatasetManifest | None, vocab_size: int | None
) -> tuple[list[Problem], list[Damage]]:
    problems: list[Problem] = []
    if manifest:
        problems = count_problems(manifest, index)
        if problems:
            # The checksums belong to another .bin.
            return problems, []
        problems += index_problems(manifest, index)
    with _reading("verify", index) as advance:
        damage = list(damaged_blocks(manifest, index, vocab_size=vocab_size, advance=advance))
    return problems + [each.problem(index) for each in damage], damage


@contextmanager
def _reading(title: str, index: Index) -> Iterator[Callable[[int], None]]:
    """Show progress over the .bin; yields the function to call with the bytes read."""
    with ByteProgress(title, index.num_bytes) as progress:

        def advance(size: int) -> None:
            tokens = (progress.bytes + size) // index.itemsize
            at_end = tokens == index.num_tokens
            documents = index.num_documents if at_end else index.document_of(tokens)
            progress.advance(size, documents - progress.documents)

        yield advance


def _document_lengths(index: Index) -> Lengths:
    # Memory grows with the number of different lengths, not of documents.
    values, counts = np.empty(0, np.int64), np.empty(0, np.int64)
    for chunk in index.document_lengths():
        chunk_values, chunk_counts = np.unique(chunk, return_counts=True)
        values, places = np.unique(np.concatenate((values, chunk_values)), return_inverse=True)
        counts = np.bincount(places, np.concatenate((counts, chunk_counts))).astype(np.int64)
    middle = np.searchsorted(np.cumsum(counts), (index.num_documents + 1) // 2)
    return Lengths(int(values[0]), int(values[middle]), int(values[-1]), _histogram(values, counts))


def _histogram(values: NDArray[np.int64], counts: NDArray[np.int64]) -> list[tuple[int, int, int]]:
    """Histogram by powers of two: 0, 1, 2 to 3, 4 to 7, ..., from the shortest document to the longest."""
    bounds = [0, *(1 << power for power in range(int(values[-1]).bit_length() + 1))]
    rows = []
    for low, high in pairwise(bounds):
        if values[0] < high:
            inside = (values >= low) & (values < high)
            rows.append((low, high - 1, int(counts[inside].sum())))
    return rows


def _shown(index: Index, tokenizer: Tokenizer | None, start: int, end: int) -> Iterator[ShownDocument]:
    tokens = index.tokens()
    for document in range(start, end):
        first, stop = map(int, index.document_starts(document, document + 2))
        ids = tokens[first : min(stop, first + _SHOWN_TOKENS)].tolist()
        text = _decode(tokenizer, ids) if tokenizer else " ".join(map(str, ids))
        yield ShownDocument(document, stop - first, text)


def _decode(tokenizer: Tokenizer, ids: list[int]) -> str:
    outside = [token for token in ids if not 0 <= token < tokenizer.vocab_size]
    return f"(token {outside[0]} is outside the vocabulary)" if outside else tokenizer.decode(ids)


def _as_json(inspection: Inspection) -> str:
    return json.dumps(asdict(inspection), ensure_ascii=False, indent=2)


def _as_text(found: Inspection) -> Iterator[str]:
    manifest = found.manifest or {}
    lengths = found.document_lengths
    lines = {
        "dataset": found.prefix,
        "files": f".bin {found.bin_bytes:,} bytes, .idx {found.idx_bytes:,} bytes, "
        + ("with a manifest" if manifest else "no manifest: --write-manifest adds one"),
        "documents": f"{found.documents:,}",
        "tokens": f"{found.tokens:,} as {found.dtype}",
        "tokenizer": f"SHA-256 {manifest.get('tokenizer_sha256') or 'unknown'}",
        "vocabulary": f"{found.vocab_size:,}" if found.vocab_size else "unknown",
        "content id": found.content_id,
        "made with": _listed(manifest.get("options", {})),
        "by": _listed(manifest.get("versions", {})),
    }
    if text_bytes := manifest.get("text_bytes"):
        lines["text"] = f"{text_bytes:,} bytes, {text_bytes / found.tokens:.2f} bytes per token"
    yield from (f"{name:<12}{value}" for name, value in lines.items() if value)
    yield f"{'lengths':<12}min {lengths.min:,}, median {lengths.median:,}, max {lengths.max:,} tokens"
    most = max(documents for _, _, documents in lengths.histogram)
    for low, high, documents in lengths.histogram:
        bar = "#" * -(-_BAR_WIDTH * documents // most)
        yield f"{low:>13,} - {high:<13,} {bar:<{_BAR_WIDTH}} {documents:,}"
    yield f"{'verified':<12}{_verdict(found)}"
    for shown in found.shown:
        yield f"\n--- document {shown.document:,}: {shown.tokens:,} tokens" + (
            f", the first {_SHOWN_TOKENS:,}" if shown.tokens > _SHOWN_TOKENS else ""
        )
        yield _printable(shown.text)


def _listed(pairs: dict[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in pairs.items())


def _verdict(found: Inspection) -> str:
    if found.problems:
        return f"NO: {len(found.problems):,} problems, listed in the error"
    if not found.verified:
        quick = "index, sizes, first and last block" if found.manifest else "index and sizes"
        return f"{quick}; --verify reads every byte"
    checksums = "every byte" if found.manifest else "no checksums to compare with"
    ids = (
        f"every id below {found.vocab_size:,}" if found.vocab_size else "ids not checked: no vocabulary known"
    )
    return f"{checksums}; {ids}"


def _printable(text: str) -> str:
    # A document must not control the terminal that shows it.
    return "".join(
        letter if letter.isprintable() or letter in "\n\t" else letter.encode("unicode_escape").decode()
        for letter in text
    )
