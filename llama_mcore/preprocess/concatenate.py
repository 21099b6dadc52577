"""Parts one after the other become datasets, each with its manifest, and one list of the lines left out."""

import glob
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from llama_mcore.data.index import bin_path, idx_path
from llama_mcore.data.indexed_dataset import IndexedWriter
from llama_mcore.data.manifest import (
    BlockChecksums,
    DatasetManifest,
    file_sha256,
    manifest_path,
    write_manifest,
)
from llama_mcore.files import output_errors, published
from llama_mcore.preprocess.inputs import Unit
from llama_mcore.preprocess.job import Job
from llama_mcore.preprocess.part_store import PartRecord
from llama_mcore.preprocess.readers.lines import lines_before
from llama_mcore.progress import ByteProgress


class DatasetWriter:
    """Streams documents to a dataset and describes it: its three files appear when the block succeeds.

    `known` are the fields of the manifest that the tokens do not tell.
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
        """As IndexedWriter's; the tokens have the dtype of the dataset."""
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
    job: Job,
    units: Sequence[tuple[Unit, PartRecord]],
    datasets: Mapping[int, tuple[str, Mapping[str, Any]]],
) -> None:
    """Write datasets of these units: output -> its prefix and what is known of it; others are left out."""
    with ExitStack() as stack:
        writers = {
            output: stack.enter_context(DatasetWriter(prefix, job.dtype, known))
            for output, (prefix, known) in datasets.items()
        }
        progress = stack.enter_context(ByteProgress("joining", sum(record.size for _, record in units)))
        for unit, record in units:
            part = job.parts.read(unit, record, job.dtype)
            for output, writer in writers.items():
                writer.add_documents(part.tokens[output], part.lengths[output])
            progress.advance(bytes=record.size, documents=record.documents)


def write_quarantine(job: Job, units: Sequence[tuple[Unit, PartRecord]], path: Path) -> None:
    """List what was skipped, a JSON object each: file, line, reason, start. Without any there is no file."""
    if not any(record.skipped for _, record in units):
        path.unlink(missing_ok=True)
        return
    with published(path) as temporary, output_errors(path), temporary.open("wb") as stream:
        place, before = (-1, -1), 0
        for unit, record in units:
            source = job.sources[unit.source]
            # Rows of Parquet are counted in their file; of lines no worker knows how many are before its own.
            counted = source.format not in ("parquet", "text")
            if (unit.source, unit.cut) != place and counted:
                before = lines_before(source, unit.cut * job.unit_bytes) if unit.cut else 0
            if record.skipped:
                stream.writelines(_numbered(job.parts.skipped_lines(unit, record, job.dtype), before))
            place, before = (unit.source, unit.cut + 1), before + record.lines if counted else 0


def _numbered(entries: bytes, before: int) -> Iterator[bytes]:
    for entry in map(orjson.loads, entries.splitlines()):
        if entry["line"] is not None:
            entry["line"] += 1 + before
        yield orjson.dumps(entry) + b"\n"


def remove_dataset(prefix: str) -> None:
    """An older dataset of that name, index first: without it no reader takes the rest for one."""
    for path in (idx_path(prefix), bin_path(prefix), manifest_path(prefix)):
        path.unlink(missing_ok=True)


def remove_leftovers(path: Path) -> None:
    """What a killed job left under temporary names. No other process may be writing `path`."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        left.unlink(missing_ok=True)
