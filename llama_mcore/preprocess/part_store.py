"""Parts of a dataset in the making, from which a killed job goes on.

PREFIX.parts holds plan.json, which says what the parts depend on, and two files for each unit that is done:
GROUP-INDEX.bin with its tokens and document lengths, output by output, and then the lines that were skipped;
and GROUP-INDEX.json, its record, which appears last. The record has the checksum of the .bin, compared when
the parts are joined, so that nothing needs an fsync on the way.
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from llama_mcore.errors import ConfigError, OutputError, Problem
from llama_mcore.files import output_errors, temporary_name
from llama_mcore.preprocess.inputs import Unit
from llama_mcore.small_file import read_json, read_small_file

_MOST_DIFFERENCES = 5
_LARGEST_PLAN, _LARGEST_RECORD = 256 << 20, 1 << 20
PLAN = "plan.json"
_RECORD_NAME = re.compile(r"(\d+)-(\d+)\.json")


class OutputCounts(BaseModel):
    """Counts of a part for one output."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    documents: int
    tokens: int
    text_bytes: int
    longest_document: int


class PartRecord(BaseModel):
    """Counts and checksum of a part. All of them are of this unit alone."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    plan: str
    """SHA-256 of the plan.json that it was made under."""
    crc32: int
    size: int
    """Bytes of the .bin."""
    outputs: list[OutputCounts]
    documents: int
    """Lines of the input that are not blank, or rows, or text files."""
    empty: list[int]
    """Documents without text, for each key."""
    skipped: int
    """Documents that could not be used."""
    lines: int
    input_bytes: int
    """Bytes on disk that the unit took."""
    ended: bool
    """True for the last unit of its group."""


@dataclass(frozen=True)
class Part:
    """Encoded documents of a unit."""

    tokens: Sequence[NDArray[np.integer]]
    """The tokens of each output."""
    lengths: Sequence[NDArray[np.integer]]
    skipped_lines: bytes
    """JSON lines."""


class PartsFolder:
    """The folder of the parts. Workers write to it, the parent reads it."""

    def __init__(self, path: Path, plan: str) -> None:
        self.path, self.plan = path, plan

    def write(self, unit: Unit, part: Part, **counts: Any) -> PartRecord:
        """Store a part: from then on it survives the end of every process."""
        path = self._bin_path(unit)
        sections = [
            section.data.cast("B") for pair in zip(part.tokens, part.lengths, strict=True) for section in pair
        ]
        crc = size = 0
        with output_errors(path):
            with temporary_name(path).open("wb", buffering=0) as stream:
                for section in [*sections, memoryview(part.skipped_lines)]:
                    _write_all(stream, section)
                    crc, size = zlib.crc32(section, crc), size + len(section)
            os.replace(temporary_name(path), path)
            record = PartRecord(plan=self.plan, crc32=crc, size=size, **counts)
            path = path.with_suffix(".json")
            temporary_name(path).write_bytes(record.model_dump_json().encode())
            os.replace(temporary_name(path), path)
        return record

    def read(self, unit: Unit, record: PartRecord, dtype: type[np.integer]) -> Part:
        """The content of a part. OutputError for a damaged one, which counts as not done from then on."""
        path = self._bin_path(unit)
        content = path.read_bytes() if path.exists() else b""
        if len(content) != record.size or zlib.crc32(content) != record.crc32:
            path.with_suffix(".json").unlink(missing_ok=True)
            reason = "no longer holds the bytes that were written to it"
            raise OutputError(Problem("output", path, reason, "check the disk and repeat the command"))
        tokens, lengths, start = [], [], 0
        for output in record.outputs:
            tokens.append(np.frombuffer(content, dtype, output.tokens, start))
            start += tokens[-1].nbytes
            lengths.append(np.frombuffer(content, np.int32, output.documents, start))
            start += lengths[-1].nbytes
        return Part(tokens, lengths, content[start:])

    def skipped_lines(self, unit: Unit, record: PartRecord, dtype: type[np.integer]) -> bytes:
        """The skipped lines of a part, without the rest of it."""
        tokens = sum(output.tokens for output in record.outputs) * np.dtype(dtype).itemsize
        lengths = sum(output.documents for output in record.outputs) * np.dtype(np.int32).itemsize
        with self._bin_path(unit).open("rb") as stream:
            stream.seek(tokens + lengths)
            return stream.read()

    def done(self) -> dict[tuple[int, int], PartRecord]:
        """The records of all parts made under this plan, by (group, index)."""
        records = {}
        for name in os.listdir(self.path) if self.path.exists() else ():
            if match := _RECORD_NAME.fullmatch(name):
                unit = Unit(int(match[1]), int(match[2]))
                record = _read_record(self.path / name)
                if record and record.plan == self.plan and self._has_size(unit, record.size):
                    records[unit.group, unit.index] = record
        return records

    def _has_size(self, unit: Unit, size: int) -> bool:
        path = self._bin_path(unit)
        return path.exists() and path.stat().st_size == size

    def _bin_path(self, unit: Unit) -> Path:
        return self.path / f"{unit.group:05d}-{unit.index:06d}.bin"


class Lock:
    """Lock that a job holds on its parts folder; the system releases it when the process ends."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __enter__(self) -> "Lock":
        with output_errors(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(self._folder, os.O_RDONLY)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._descriptor)
            reason = "another process is making this dataset"
            remedy = "wait for it, or choose another --output-prefix"
            raise OutputError(Problem("output", self._folder, reason, remedy)) from None
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self._descriptor)


def is_begun(folder: Path, plan: Mapping[str, str]) -> bool:
    """True if a job of this plan was begun and has not finished."""
    return _read_plan(folder / PLAN) == plan


def open_parts(folder: Path, plan: Mapping[str, str], *, restart: bool) -> PartsFolder:
    """The parts of a job, those done earlier included. The caller holds the lock of the folder.

    ConfigError names the differences where the parts come from other inputs or options.
    """
    path = folder / PLAN
    text = json.dumps(plan, ensure_ascii=False, indent=2).encode()
    before = None if restart else _read_plan(path)
    if before is None:
        _clear(folder)
    elif problems := _differences(before, plan, folder):
        raise ConfigError(problems)
    with output_errors(path):
        temporary_name(path).write_bytes(text)
        os.replace(temporary_name(path), path)
    return PartsFolder(folder, hashlib.sha256(text).hexdigest())


def _clear(folder: Path) -> None:
    # The plan first: what a kill leaves must not be taken for work to go on from.
    (folder / PLAN).unlink(missing_ok=True)
    for entry in folder.iterdir():
        entry.unlink()


def remove(folder: Path) -> None:
    """Delete the folder and everything in it."""
    if folder.exists():
        (folder / PLAN).unlink(missing_ok=True)
        shutil.rmtree(folder)


def remove_if_unused(folder: Path) -> None:
    """Delete the folder if no job can go on from it: no part is done, or the plan is gone."""
    if folder.exists():
        names = os.listdir(folder)
        if PLAN not in names or not any(map(_RECORD_NAME.fullmatch, names)):
            remove(folder)


def _write_all(stream: Any, section: memoryview) -> None:
    while section:
        section = section[stream.write(section) :]


def _read_record(path: Path) -> PartRecord | None:
    try:
        return PartRecord.model_validate_json(read_small_file(path, _LARGEST_RECORD))
    except (OSError, ValueError):
        return None


def _read_plan(path: Path) -> dict[str, Any] | None:
    try:
        plan = read_json(path, _LARGEST_PLAN)
    except (OSError, ValueError):
        return None
    return plan if isinstance(plan, dict) else None


def _differences(before: Mapping[str, Any], plan: Mapping[str, Any], folder: Path) -> list[Problem]:
    names = [name for name in {**plan, **before} if plan.get(name) != before.get(name)]
    remedy = f"repeat the settings of the job that left {folder}, or give --restart to start from scratch"
    problems = [
        Problem(
            name, plan.get(name), f"differs from {before.get(name)}, with which the job was begun", remedy
        )
        for name in names[:_MOST_DIFFERENCES]
    ]
    if more := len(names) - len(problems):
        problems.append(Problem("settings and inputs", f"{more} more", "differ too", remedy))
    return problems
