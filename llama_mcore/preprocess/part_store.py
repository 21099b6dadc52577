"""The parts of a dataset in the making: what makes a killed job go on where it was.

PREFIX.parts holds plan.json, which says from what and how the parts are made, and two files of each unit:
SSSSS-CCCCCC.bin has its tokens and document lengths for each output one after the other and last the lines
that were left out; SSSSS-CCCCCC.json is its record. When that is there, the part is done. It has the checksum
of the .bin, compared when the parts are joined; so nothing needs to be forced to the disk on the way.
"""

import fcntl
import hashlib
import os
import re
import shutil
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from llama_mcore.errors import ConfigError, OutputError, Problem
from llama_mcore.files import output_errors, temporary_name
from llama_mcore.preprocess.inputs import Unit
from llama_mcore.small_file import read_small_file

_MOST_DIFFERENCES = 5
_LARGEST_PLAN, _LARGEST_RECORD = 256 << 20, 1 << 20
PLAN = "plan.json"
_RECORD_NAME = re.compile(r"(\d+)-(\d+)\.json")


class OutputCounts(BaseModel):
    """What a part holds for one output."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    documents: int
    tokens: int
    text_bytes: int
    longest_document: int


class PartRecord(BaseModel):
    """What is known of a part. Sizes and counts are of this unit alone."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    plan: str
    """Of the plan.json that it was made under."""
    crc32: int
    size: int
    """Bytes of the .bin."""
    outputs: list[OutputCounts]
    documents: int
    """Lines of the input that are no blank ones, rows, or text files."""
    empty: list[int]
    """Documents without text, of each key."""
    skipped: int
    """Documents that cannot be used."""
    lines: int
    input_bytes: int
    """Of the file as it is on disk."""
    ended: bool
    """The source has no unit after this."""


@dataclass(frozen=True)
class Part:
    """The content of one unit."""

    tokens: Sequence[NDArray[np.integer]]
    """Of each output."""
    lengths: Sequence[NDArray[np.integer]]
    skipped_lines: bytes
    """JSON lines."""


class PartsFolder:
    """Where parts are. Workers use it to write, the parent to open, to read and to remove."""

    def __init__(self, path: Path, plan: str) -> None:
        self.path, self.plan = path, plan

    def write(self, unit: Unit, part: Part, **counts: Any) -> PartRecord:
        """Store a part; when this returns it survives the end of every process."""
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
            temporary_name(path).write_bytes(orjson.dumps(record.model_dump()))
            os.replace(temporary_name(path), path)
        return record

    def read(self, unit: Unit, record: PartRecord, dtype: type[np.integer]) -> Part:
        """The content of a part that is done. One that is damaged counts as not done from then on."""
        path = self._bin_path(unit)
        content = path.read_bytes() if path.exists() else b""
        if len(content) != record.size or zlib.crc32(content) != record.crc32:
            path.with_suffix(".json").unlink(missing_ok=True)
            reason = "does not hold the bytes that were written to it"
            raise OutputError(
                Problem("output", path, reason, "check the disk and give the same command again")
            )
        tokens, lengths, start = [], [], 0
        for output in record.outputs:
            tokens.append(np.frombuffer(content, dtype, output.tokens, start))
            start += tokens[-1].nbytes
            lengths.append(np.frombuffer(content, np.int32, output.documents, start))
            start += lengths[-1].nbytes
        return Part(tokens, lengths, content[start:])

    def skipped_lines(self, unit: Unit, record: PartRecord, dtype: type[np.integer]) -> bytes:
        """The last section of a part alone."""
        tokens = sum(output.tokens for output in record.outputs) * np.dtype(dtype).itemsize
        lengths = sum(output.documents for output in record.outputs) * np.dtype(np.int32).itemsize
        with self._bin_path(unit).open("rb") as stream:
            stream.seek(tokens + lengths)
            return stream.read()

    def done(self) -> dict[tuple[int, int], PartRecord]:
        """The records of all parts of this plan: (source, cut) -> record."""
        records = {}
        for name in os.listdir(self.path) if self.path.exists() else ():
            if match := _RECORD_NAME.fullmatch(name):
                unit = Unit(int(match[1]), int(match[2]))
                record = _read_record(self.path / name)
                if record and record.plan == self.plan and _size(self._bin_path(unit)) == record.size:
                    records[unit.source, unit.cut] = record
        return records

    def _bin_path(self, unit: Unit) -> Path:
        return self.path / f"{unit.source:05d}-{unit.cut:06d}.bin"


class Lock:
    """Held while a job makes a dataset; the system lets it go with the process."""

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
            remedy = "wait for it or choose another prefix"
            raise OutputError(Problem("output", self._folder, reason, remedy)) from None
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self._descriptor)


def is_begun(folder: Path, plan: Mapping[str, str]) -> bool:
    """Whether a job of this plan has not come to its end."""
    return _read_plan(folder / PLAN) == plan


def open_parts(folder: Path, plan: Mapping[str, str], *, restart: bool) -> PartsFolder:
    """The parts of a job, found again or begun. The caller holds the lock of the folder.

    ConfigError names what differs if the parts there are of other inputs or were made with other options.
    """
    path = folder / PLAN
    text = orjson.dumps(plan, option=orjson.OPT_INDENT_2)
    before = None if restart else _read_plan(path)
    if before is None:
        clear(folder)
    elif problems := _differences(before, plan, folder):
        raise ConfigError(problems)
    with output_errors(path):
        temporary_name(path).write_bytes(text)
        os.replace(temporary_name(path), path)
    return PartsFolder(folder, hashlib.sha256(text).hexdigest())


def clear(folder: Path) -> None:
    """Remove all that is in it, the plan first: what a kill leaves is not taken for work to go on with."""
    (folder / PLAN).unlink(missing_ok=True)
    for entry in folder.iterdir():
        entry.unlink()


def remove(folder: Path) -> None:
    """Remove the folder and what is in it."""
    if folder.exists():
        (folder / PLAN).unlink(missing_ok=True)
        shutil.rmtree(folder)


def remove_if_unused(folder: Path) -> None:
    """Remove the folder if no job can go on with it: no part in it is done, or its plan is gone."""
    if folder.exists():
        names = os.listdir(folder)
        if PLAN not in names or not any(map(_RECORD_NAME.fullmatch, names)):
            remove(folder)


def _write_all(stream: Any, section: memoryview) -> None:
    while section:
        section = section[stream.write(section) :]


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else -1


def _read_record(path: Path) -> PartRecord | None:
    try:
        return PartRecord.model_validate_json(read_small_file(path, _LARGEST_RECORD))
    except (OSError, ValueError):
        return None


def _read_plan(path: Path) -> dict[str, Any] | None:
    try:
        plan = orjson.loads(read_small_file(path, _LARGEST_PLAN))
    except (OSError, ValueError):
        return None
    return plan if isinstance(plan, dict) else None


def _differences(before: Mapping[str, Any], plan: Mapping[str, Any], folder: Path) -> list[Problem]:
    names = [name for name in {**plan, **before} if plan.get(name) != before.get(name)]
    remedy = f"give --restart to start from scratch, or the settings of the job that left {folder}"
    problems = [
        Problem(name, plan.get(name), f"differs from what was begun with: {before.get(name)}", remedy)
        for name in names[:_MOST_DIFFERENCES]
    ]
    if more := len(names) - len(problems):
        problems.append(Problem("settings and inputs", f"{more} more", "differ too", remedy))
    return problems
