"""Which files an input names, in which format each is, and how they are cut into units of work.

A unit is what one worker reads, encodes and writes at a time. Its limits follow from the input alone: the
lines that begin in bytes [k * unit_bytes, (k + 1) * unit_bytes) of a file, compressed files after
decompression, rows of Parquet likewise, text files by where they lie in the run of text files.
"""

import glob
import os
import stat
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from pathlib import Path
from typing import Literal

from llama_mcore.errors import MissingInputError, Problem, input_problem

Format = Literal["jsonl", "gzip", "zstd", "parquet", "text", "stream"]

FORMATS: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".json": "jsonl",
    ".jsonl.gz": "gzip",
    ".json.gz": "gzip",
    ".jsonl.zst": "zstd",
    ".json.zst": "zstd",
    ".parquet": "parquet",
    ".txt": "text",
}
_MAGIC: dict[bytes, str] = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x50\x2a\x4d\x18": "zstd",  # a skippable frame, which pzstd and seekable writers put first
    b"PAR1": "parquet",
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"PK\x03\x04": "zip",
}
_NEEDS_MAGIC = ("gzip", "zstd", "parquet")
STDIN = "-"

# Small enough that the workers of a small input share it, large enough that a terabyte is no million files.
_SMALLEST_UNIT, _LARGEST_UNIT, _UNITS_WANTED = 4 << 20, 64 << 20, 1024


@dataclass(frozen=True)
class InputFile:
    path: Path
    format: Format
    size: int
    """Bytes on disk; 0 of a stream."""
    argument: str
    """What the user wrote: the file itself, or a folder or pattern that holds it."""

    @property
    def identity(self) -> str:
        """Another once the file is changed or another takes its place; a stream has none."""
        if self.format == "stream":
            return f"{self.path}"
        return f"{self.path}, {self.size} bytes, changed {self.path.stat().st_mtime_ns} ns"


@dataclass(frozen=True)
class Source:
    """What one reader reads in order: a file, or a run of text files."""

    index: int
    files: tuple[InputFile, ...]
    position: int
    """Bytes of input before it."""
    units: int | None
    """None when only its end tells: a compressed file, Parquet, a stream."""

    @property
    def format(self) -> Format:
        return self.files[0].format

    @property
    def path(self) -> Path:
        return self.files[0].path

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)


@dataclass(frozen=True)
class Unit:
    """One piece of work."""

    source: int
    cut: int
    """Counted from 0 in its source."""
    payload: bytes | None = None
    """The lines themselves, of a stream: only one process can read it."""
    lines_before: int | None = None
    """Lines of a stream before these."""


def find_inputs(arguments: Sequence[Path | str]) -> list[InputFile]:
    """The files that files, folders, patterns and `-` name, in the order given, folders and patterns sorted.

    MissingInputError lists everything that names no file, names one twice, or is not what its name says.
    """
    problems = [] if arguments else [Problem("--input", "(none)", "needs at least one file")]
    files: list[InputFile] = []
    for argument in map(str, arguments):
        found, problem = _expand(argument)
        problems += [problem] if problem else []
        for path in found:
            file, problem = _describe(path, argument)
            problems += [problem] if problem else []
            files.append(file)
    seen: set[Path] = set()
    for file in files:
        if file.path in seen:
            problems.append(Problem("--input", file.path, "is named twice", "name each file once"))
        seen.add(file.path)
    if problems:
        raise MissingInputError(problems)
    return files


def unit_bytes_for(files: Sequence[InputFile]) -> int:
    """Bytes of one unit, by the size of the whole input."""
    return min(max(sum(file.size for file in files) // _UNITS_WANTED, _SMALLEST_UNIT), _LARGEST_UNIT)


def sources_of(files: Sequence[InputFile], unit_bytes: int) -> list[Source]:
    """Each file a source; neighbouring text files of one argument are one together."""
    sources: list[Source] = []
    position = 0
    for (is_text, _), group in groupby(files, lambda file: (file.format == "text", file.argument)):
        together = list(group)
        for members in [together] if is_text else [[file] for file in together]:
            size = sum(file.size for file in members)
            known = members[0].format in ("jsonl", "text")
            units = max(1, -(-size // unit_bytes)) if known else None
            sources.append(Source(len(sources), tuple(members), position, units))
            position += size
    return sources


def text_files_of(source: Source, cut: int, unit_bytes: int) -> Sequence[InputFile]:
    """The text files of one unit: those that begin in its bytes of the run."""
    begins = [0, *accumulate(file.size for file in source.files)][:-1]
    # An empty file at the very end begins where the last unit ends.
    last = source.units is not None and cut == source.units - 1
    end = len(begins) if last else bisect_left(begins, (cut + 1) * unit_bytes)
    return source.files[bisect_left(begins, cut * unit_bytes) : end]


def _expand(argument: str) -> tuple[list[Path], Problem | None]:
    # Unlike pathlib, os.path answers for names that the system refuses: too long, in a closed folder.
    path = Path(argument)
    if argument == STDIN or (os.path.exists(argument) and not os.path.isdir(argument)):
        return [path], None
    if os.path.isdir(argument):
        found = list(_files_in(path))
        reason = f"this folder holds no file in a known format ({', '.join(FORMATS)})"
    elif glob.has_magic(argument):
        found = [Path(name) for name in sorted(glob.glob(argument, recursive=True)) if os.path.isfile(name)]
        reason = "matches no file"
    else:
        return [], input_problem("--input", argument, "check the path")
    return found, None if found else Problem("--input", argument, reason, "check the path")


def _files_in(folder: Path) -> Iterator[Path]:
    """Sorted, hidden ones left out."""
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith(".") and format_by_name(Path(name)):
                yield Path(parent) / name


def format_by_name(path: Path) -> Format | None:
    name = path.name.lower()
    return next((FORMATS[suffix] for suffix in FORMATS if name.endswith(suffix)), None)


def _describe(path: Path, argument: str) -> tuple[InputFile, Problem | None]:
    if argument == STDIN:
        return InputFile(path, "stream", 0, argument), None
    # A name that says nothing is taken for JSONL: what is not will be found out at its first line.
    format: Format = format_by_name(path) or "jsonl"
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            return InputFile(path, "stream", 0, argument), None
        with path.open("rb") as stream:
            start = stream.read(8)
    except OSError as error:
        return InputFile(path, format, 0, argument), input_problem("--input", path, error=error)
    content = next((kind for magic, kind in _MAGIC.items() if start.startswith(magic)), None)
    problem = None
    if content != (format if format in _NEEDS_MAGIC else None):
        found = content or "something else"
        suffixes = " or ".join(suffix for suffix, known in FORMATS.items() if known == content)
        remedy = f"name it {suffixes}" if suffixes else "check the file"
        problem = Problem("--input", path, f"holds {found}, which its name does not say", remedy)
    return InputFile(path, format, status.st_size, argument), problem
