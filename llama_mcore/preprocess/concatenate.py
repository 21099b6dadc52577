"""Concatenation of parts: datasets with their manifests, and the list of the lines that were skipped."""

import glob
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llama_mcore.data.index import bin_path, idx_path
from llama_mcore.data.indexed_dataset import IndexedWriter
from llama_mcore.data.manifest import (
    BlockChecksums,
    DatasetManifest,
    compact_json,
    file_sha256,
    manifest_path,
    write_manifest,
)
from llama_mcore.files import output_errors, published
from llama_mcore.preprocess.inputs import Unit
from llama_mcore.preprocess.options import EncodeSpec
from llama_mcore.preprocess.part_store import PartRecord
from llama_mcore.preprocess.readers.jsonl import lines_before
from llama_mcore.progress import ByteProgress


class DatasetWriter:
    """Writer of a dataset and its manifest: the three files appear when the `with` block succeeds.

    `known` are the fields of the manifest that do not follow from the tokens.
    """

    def __init__(self, prefix: str, dtype: type[np.integer], known: Mapping[str, Any]) -> None:
        self.prefix, self._known = prefix, known
        self._writer = IndexedWriter(prefix, dtype)
        self._longest_document = 0
        self._checksums = BlockChecksums()

    def __enter__(self) -> "DatasetWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.__exit__(kind, error, trace)
        if error is None:
            write_manifest(self.prefix, self._manifest())

    def add_documents(self, tokens: NDArray[np.integer], lengths: NDArray[np.integer]) -> None:
        """Append documents as `IndexedWriter` does; the tokens have the dtype of the dataset."""
        self._writer.add_documents(tokens, lengths)
        self._checksums.update(tokens.data)
        self._longest_document = max(self._longest_document, int(lengths.max(initial=0)))

    def _manifest(self) -> DatasetManifest:
        return DatasetManifest(
            dtype=np.dtype(self._writer.dtype).name,  # type: ignore[arg-type]
            documents=self._writer.num_documents,
            tokens=self._writer.num_tokens,
            longest_document=self._longest_document,
            block_checksums=self._checksums.finish(),
            idx_sha256=file_sha256(idx_path(self.prefix)),
            **self._known,
        )


def join_parts(
    spec: EncodeSpec,
    units: Sequence[tuple[Unit, PartRecord]],
    datasets: Mapping[int, tuple[str, Mapping[str, Any]]],
) -> None:
    """Write datasets of these units. `datasets`: output -> prefix and known fields of its manifest."""
    with ExitStack() as stack:
        writers = {
            output: stack.enter_context(DatasetWriter(prefix, spec.dtype, known))
            for output, (prefix, known) in datasets.items()
        }
        progress = stack.enter_context(ByteProgress("joining", sum(record.size for _, record in units)))
        for unit, record in units:
            part = spec.parts.read(unit, record, spec.dtype)
            for output, writer in writers.items():
                writer.add_documents(part.tokens[output], part.lengths[output])
            progress.advance(record.size, record.documents)


def write_quarantine(spec: EncodeSpec, units: Sequence[tuple[Unit, PartRecord]], path: Path) -> None:
    """List the skipped lines, a JSON object each: file, line, reason, start. None skipped: no file."""
    if not any(record.skipped for _, record in units):
        path.unlink(missing_ok=True)
        return
    with published(path) as temporary, output_errors(path), temporary.open("wb") as stream:
        following, before = (-1, -1), 0
        for unit, record in units:
            group = spec.groups[unit.group]
            # Workers count lines from the start of their unit, rows of Parquet from the start of the file.
            by_unit = group.format not in ("parquet", "text")
            if (unit.group, unit.index) != following and by_unit:
                before = lines_before(group, unit.index * spec.unit_bytes)
            if record.skipped:
                stream.writelines(_numbered(spec.parts.skipped_lines(unit, record, spec.dtype), before))
            following, before = (unit.group, unit.index + 1), before + record.lines if by_unit else 0


def _numbered(entries: bytes, before: int) -> Iterator[bytes]:
    for entry in map(json.loads, entries.splitlines()):
        if entry["line"] is not None:
            entry["line"] += 1 + before
        yield compact_json(entry) + b"\n"


def remove_dataset(prefix: str) -> None:
    """Delete a dataset, its index first: without it no reader takes the rest for a dataset."""
    for path in (idx_path(prefix), bin_path(prefix), manifest_path(prefix)):
        path.unlink(missing_ok=True)


def remove_leftovers(path: Path) -> None:
    """Delete what killed jobs left under temporary names. No other process may be writing `path`."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        left.unlink(missing_ok=True)
