"""Input files, their formats, and their division into groups and units.

A group is what one reader reads in order: a file, or neighbouring text files. A unit is what one worker
reads, encodes and stores at a time: unit k of a group holds the documents that begin in its bytes [k *
unit_bytes, (k + 1) * unit_bytes), counted after decompression. So units follow from the input alone.
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

# Small enough for several workers to share a small input, large enough for a terabyte to give few parts.
_SMALLEST_UNIT, _LARGEST_UNIT, _UNITS_WANTED = 4 << 20, 64 << 20, 1024


@dataclass(frozen=True)
class InputFile:
    path: Path
    format: Format
    size: int
    """Bytes on disk; 0 for a stream."""
    argument: str
    """The argument that named it: the file itself, or a folder or pattern."""

    @property
    def identity(self) -> str:
        """Text that changes when the file is changed or replaced; of a stream the path alone."""
        if self.format == "stream":
            return f"{self.path}"
        return f"{self.path}, {self.size} bytes, changed {self.path.stat().st_mtime_ns} ns"


@dataclass(frozen=True)
class FileGroup:
    """Files that one reader reads in order: a single one, or neighbouring text files."""

    index: int
    files: tuple[InputFile, ...]
    position: int
    """Bytes of input before it."""
    num_units: int | None
    """None if unknown until its end is read: a compressed file, Parquet, a stream."""

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
    """The work that a worker does at a time: a stretch of a group."""

    group: int
    index: int
    """Counted from 0 in its group."""
    payload: bytes | None = None
    """The lines themselves if they come from a stream, which only one process can read."""
    lines_before: int | None = None
    """Lines of the stream before these."""


def find_inputs(arguments: Sequence[Path | str]) -> list[InputFile]:
    """The input files that arguments name, in the order given; those of a folder or pattern sorted.

    Raises MissingInputError with every argument that names no file, names one twice, or names one whose
    content is not what its name says.
    """
    problems = (
        []
        if arguments
        else [Problem("--input", "(none)", "needs at least one file", "name files, folders or patterns")]
    )
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
    """Bytes of a unit, by the size of the whole input."""
    return min(max(sum(file.size for file in files) // _UNITS_WANTED, _SMALLEST_UNIT), _LARGEST_UNIT)


def group_files(files: Sequence[InputFile], unit_bytes: int) -> list[FileGroup]:
    """Groups of one file each, or of neighbouring text files that one argument names."""
    groups: list[FileGroup] = []
    position = 0
    for (is_text, _), run in groupby(files, lambda file: (file.format == "text", file.argument)):
        neighbours = list(run)
        for members in [neighbours] if is_text else [[file] for file in neighbours]:
            size = sum(file.size for file in members)
            known = members[0].format in ("jsonl", "text")
            num_units = max(1, -(-size // unit_bytes)) if known else None
            groups.append(FileGroup(len(groups), tuple(members), position, num_units))
            position += size
    return groups


def text_files_of(group: FileGroup, index: int, unit_bytes: int) -> Sequence[InputFile]:
    """The text files of a unit: those that begin in its bytes of the group."""
    begins = [0, *accumulate(file.size for file in group.files)][:-1]
    # An empty file at the very end begins where the last unit ends.
    last = group.num_units is not None and index == group.num_units - 1
    end = len(begins) if last else bisect_left(begins, (index + 1) * unit_bytes)
    return group.files[bisect_left(begins, index * unit_bytes) : end]


def _expand(argument: str) -> tuple[list[Path], Problem | None]:
    # Unlike pathlib, os.path answers for names that the system refuses: too long, in a closed folder.
    path = Path(argument)
    if argument == STDIN or (os.path.exists(argument) and not os.path.isdir(argument)):
        return [path], None
    if os.path.isdir(argument):
        found = list(_files_in(path))
        reason = f"the folder holds no file of a known format ({', '.join(FORMATS)})"
    elif glob.has_magic(argument):
        found = [Path(name) for name in sorted(glob.glob(argument, recursive=True)) if os.path.isfile(name)]
        reason = "matches no file"
    else:
        return [], input_problem("--input", argument, "check the path")
    return found, None if found else Problem("--input", argument, reason, "check the path")


def _files_in(folder: Path) -> Iterator[Path]:
    """Files of a known format in a folder, sorted, without hidden ones."""
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
    # An unknown ending is taken for JSONL: if the file is not, its first line is refused.
    format: Format = format_by_name(path) or "jsonl"
    try:
        str(path).encode()  # manifests are UTF-8, and they name it
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            return InputFile(path, "stream", 0, argument), None
        with path.open("rb") as stream:
            start = stream.read(8)
    except UnicodeEncodeError:
        problem = Problem("--input", path, "has a name that is not UTF-8", "rename the file")
        return InputFile(path, format, 0, argument), problem
    except OSError as error:
        return InputFile(path, format, 0, argument), input_problem("--input", path, error=error)
    file = InputFile(path, format, status.st_size, argument)
    content = next((kind for magic, kind in _MAGIC.items() if start.startswith(magic)), None)
    if content == (format if format in _NEEDS_MAGIC else None):
        return file, None
    if content is None:
        reason = f"is not a {format} file, as its name says"
        return file, Problem("--input", path, reason, "rename it, or check that it is complete")
    suffixes = " or ".join(suffix for suffix, known in FORMATS.items() if known == content)
    remedy = f"rename it to end in {suffixes}" if suffixes else "decompress it first"
    return file, Problem("--input", path, f"holds {content} data, which its name does not say", remedy)
