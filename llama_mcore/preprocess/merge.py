"""Merging of datasets: the shards of a job array, or datasets made at different times, as one."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llama_mcore.data.finished import JobIdentity, is_finished, job_sha256
from llama_mcore.data.index import bin_path, idx_path
from llama_mcore.data.indexed_dataset import IndexedDataset
from llama_mcore.data.manifest import BlockChecksums, DatasetManifest, manifest_path
from llama_mcore.errors import DataError, MissingInputError, Problem
from llama_mcore.files import prepare_output
from llama_mcore.preprocess.concatenate import DatasetWriter, remove_leftovers
from llama_mcore.progress import ByteProgress

CHUNK = 16 << 20
"""Bytes of tokens in memory at a time, or one document if it is longer."""


def merge_datasets(inputs: Sequence[Path | str], output_prefix: Path | str, *, force: bool = False) -> None:
    """Write PREFIX.bin, .idx and .json with the documents of all inputs in the order given.

    Each input is the prefix of a dataset, or a folder, which stands for all datasets in it, sorted. They must
    have one dtype and one tokenizer, and either all or none of them be validation sets. Every byte is checked
    against the manifest of its dataset on the way. OutputError for another dataset of that name, unless
    `force`.
    """
    prefixes = _prefixes(inputs)
    datasets = [IndexedDataset(prefix) for prefix in prefixes]
    _check_compatible(datasets)
    output = str(output_prefix)
    if output in prefixes:
        raise DataError(Problem("--output-prefix", output, "is one of the inputs", "choose another name"))
    job = JobIdentity(_job_sha256(datasets))
    written = [bin_path(output), idx_path(output), manifest_path(output)]
    for path in written:
        prepare_output(path, "--output-prefix")
    if not force and is_finished([output], job):
        print(f"{output}.bin and .idx: already there, nothing to do", flush=True)
        return
    for path in written:
        remove_leftovers(path)
    total = sum(dataset.index.num_bytes for dataset in datasets)
    known = _known([dataset.manifest for dataset in datasets]) | {"job_sha256": job.sha256}
    with (
        DatasetWriter(output, datasets[0].dtype, known) as writer,
        ByteProgress("merge-datasets", total) as progress,
    ):
        for dataset in datasets:
            _append(writer, dataset, progress)
    empty = sum(dataset.num_documents for dataset in datasets) - progress.documents
    left_out = f" ({empty:,} without tokens were left out)" if empty else ""
    print(
        f"{output}.bin and .idx: {progress.documents:,} documents{left_out}, {progress.tokens:,} tokens from "
        f"{len(datasets):,} datasets, {progress.speed}",
        flush=True,
    )


def _prefixes(inputs: Sequence[Path | str]) -> list[str]:
    prefixes, problems = [], []
    for given in map(str, inputs):
        if os.path.isdir(given):
            found = sorted(str(path.with_suffix("")) for path in Path(given).glob("[!.]*.idx"))
            if not found:
                problems.append(Problem("--input", given, "the folder holds no dataset", "check the path"))
            prefixes += found
        else:
            prefixes.append(given.removesuffix(".idx").removesuffix(".bin"))
    problems += [
        Problem("--input", prefix, "is named more than once", "name each dataset once")
        for prefix in dict.fromkeys(prefixes)
        if prefixes.count(prefix) > 1
    ]
    if problems:
        raise MissingInputError(problems)
    return prefixes


def _check_compatible(datasets: Sequence[IndexedDataset]) -> None:
    """Raise DataError unless all have one dtype and, as far as manifests tell, one tokenizer and EOD."""
    first = datasets[0]
    problems = [
        Problem(
            name,
            value,
            f"is that of {dataset.prefix}; {first.prefix} has {expected}",
            "merge datasets that were made with one tokenizer and the same options",
        )
        for dataset in datasets[1:]
        for name, value, expected in _features(dataset, first)
        if value != expected
    ]
    if problems:
        raise DataError(problems)


def _features(one: IndexedDataset, other: IndexedDataset) -> list[tuple[str, object, object]]:
    features: list[tuple[str, object, object]] = [("dtype", one.dtype.__name__, other.dtype.__name__)]
    if one.manifest and other.manifest:
        names = ("tokenizer_sha256", "vocab_size", "eod")
        features += [(name, getattr(one.manifest, name), getattr(other.manifest, name)) for name in names]
        options, of_other = one.manifest.options, other.manifest.options
        # a validation set merges with validation sets of the same share only
        for name in ("split", "validation_split"):
            if name in options and name in of_other:
                features.append((name, options[name], of_other[name]))
    return features


def _job_sha256(datasets: Sequence[IndexedDataset]) -> str | None:
    """Hash of the contents; None if one has no manifest, since its tokens can change without its id."""
    if not all(dataset.manifest for dataset in datasets):
        return None
    return job_sha256({"merged": [dataset.content_id for dataset in datasets]})


def _append(writer: DatasetWriter, dataset: IndexedDataset, progress: ByteProgress) -> None:
    manifest = dataset.manifest
    checksums = BlockChecksums(manifest.block_bytes) if manifest else None
    start = 0
    for lengths in _chunks(dataset):
        tokens = dataset.tokens[start : start + int(lengths.sum())]
        start += len(tokens)
        if checksums:
            checksums.update(tokens.data)
        writer.add_documents(tokens, lengths[lengths > 0])
        documents = int(np.count_nonzero(lengths))
        progress.advance(tokens.nbytes, documents, len(tokens))
    if manifest and checksums and checksums.finish() != manifest.block_checksums:
        reason = "has blocks that do not match the checksums of its manifest"
        remedy = f"`llama-mcore inspect-dataset {dataset.prefix} --verify` lists them"
        raise DataError(Problem("dataset", bin_path(dataset.prefix), reason, remedy))


def _chunks(dataset: IndexedDataset) -> Iterator[NDArray[np.int64]]:
    """Lengths of neighbouring documents that have about CHUNK bytes together."""
    most = CHUNK // dataset.index.itemsize
    for lengths in dataset.index.document_lengths():
        ends = np.cumsum(lengths)
        first = 0
        while first < len(lengths):
            before = int(ends[first - 1]) if first else 0
            stop = max(int(np.searchsorted(ends, before + most, side="right")), first + 1)
            yield lengths[first:stop]
            first = stop


def _known(manifests: Sequence[DatasetManifest | None]) -> dict[str, Any]:
    """Fields of the merged manifest that do not follow from the tokens; none if an input has no manifest."""
    known = [manifest for manifest in manifests if manifest]
    if len(known) < len(manifests):
        return {}
    first = known[0]
    inputs = {each.path: each for manifest in known for each in manifest.inputs}
    options = {
        name: value
        for name, value in first.options.items()
        if name != "shard" and all(manifest.options.get(name) == value for manifest in known)
    }
    return {
        **{name: getattr(first, name) for name in ("tokenizer_sha256", "vocab_size", "eod", "versions")},
        **{name: _sum(known, name) for name in ("text_bytes", "empty_documents", "skipped_lines")},
        "options": {**options, "merged": str(len(known))},
        "inputs": list(inputs.values()),
    }


def _sum(manifests: Sequence[DatasetManifest], name: str) -> int | None:
    counts = [getattr(manifest, name) for manifest in manifests]
    return None if None in counts else sum(counts)
