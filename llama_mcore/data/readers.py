"""Documents from files: one small function per format, each yielding `Record`s.

An unusable line is an error that names file and line; nothing is dropped silently.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from llama_mcore.errors import DataError, MissingInputError, Problem

_EXPECTED = 'give JSONL: one object a line, such as {"text": "..."}'


@dataclass(frozen=True, slots=True)
class Record:
    """One document as its file holds it."""

    path: Path
    line: int
    """Counted from 1."""
    size: int
    """Bytes of the file that the document took."""
    fields: dict[str, Any]

    def text(self, key: str) -> str:
        """The text under `key`; DataError if there is none or it is something else."""
        if key not in self.fields:
            there = ", ".join(self.fields) or "none"
            raise self._error(f"has no key {key!r}", f"keys there: {there}")
        text = self.fields[key]
        if not isinstance(text, str):
            raise self._error(
                f"holds {type(text).__name__} under {key!r}, not a string", "name a key that holds text"
            )
        return text

    def _error(self, bound: str, remedy: str) -> DataError:
        return DataError(Problem("input", f"{self.path} line {self.line}", bound, remedy))


def check_inputs(paths: Sequence[Path]) -> int:
    """Bytes in all input files. MissingInputError names every one that is not a readable file."""
    # Unlike pathlib, os.path answers for names that the system refuses: too long, in a closed folder.
    folders = [path for path in paths if os.path.isdir(path)]
    absent = [path for path in paths if not os.path.exists(path)]
    problems = [Problem("input", path, "is a folder, not a file") for path in folders]
    problems += [Problem("input", path, "no such file", "check the path") for path in absent]
    if not paths:
        problems.append(Problem("input", "(none)", "needs at least one file"))
    if problems:
        raise MissingInputError(problems)
    return sum(path.stat().st_size for path in paths)


def read_records(paths: Sequence[Path]) -> Iterator[Record]:
    """The documents of all files, in the order given."""
    for path in paths:
        yield from read_jsonl(path)


def read_jsonl(path: Path) -> Iterator[Record]:
    """One JSON object a line; blank lines do not count as documents."""
    try:
        with path.open("rb") as stream:
            for number, line in enumerate(stream, start=1):
                if not line.isspace():
                    yield Record(path, number, len(line), _parse_object(path, number, line))
    except OSError as error:
        raise MissingInputError(Problem("input", path, f"cannot be read ({error.strerror})")) from error


def _parse_object(path: Path, number: int, line: bytes) -> dict[str, Any]:
    where = f"{path} line {number}"
    try:
        value = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        start = line[:40].decode("utf-8", errors="replace").strip()
        raise DataError(
            Problem("input", where, f"is not JSON ({error}); it starts {start!r}", _EXPECTED)
        ) from None
    if not isinstance(value, dict):
        raise DataError(
            Problem("input", where, f"holds a JSON {type(value).__name__}, not an object", _EXPECTED)
        )
    return value
