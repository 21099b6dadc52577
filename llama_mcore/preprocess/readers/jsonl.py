"""Documents from lines of JSON, read strictly: NaN, lone surrogates and invalid UTF-8 are not JSON."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import orjson

from llama_mcore.preprocess.readers.blocks import LONGEST_DOCUMENT, START, BadLine, Block
from llama_mcore.preprocess.readers.lines import Lines, TooLong

_EXPECTED = 'give JSONL: one object a line, such as {"text": "..."}'


class JsonLines:
    """Documents of JSON lines."""

    def __init__(self, path: Path, lines: Lines, keys: Sequence[str]) -> None:
        self._path, self._lines, self._keys = path, lines, keys
        # A key that occurs once in the bytes of a line cannot be there twice.
        self._quoted = [orjson.dumps(key) for key in keys]

    @property
    def ended(self) -> bool:
        return self._lines.ended

    @property
    def taken(self) -> int:
        return self._lines.taken

    def read(self, cut: int) -> Iterator[Block]:
        first = 0
        lines = self._lines.read(cut)
        # No name keeps the lines of a block alive while its texts are encoded.
        while (block := self._parse(next(lines, None), first)) is not None:
            first += block.lines
            yield block

    def close(self) -> None:
        self._lines.close()

    def _parse(self, lines: list[bytes] | None, first: int) -> Block | None:
        if lines is None:
            return None
        block = Block([[] for _ in self._keys], lines=len(lines), size=sum(map(len, lines)))
        for number, line in enumerate(lines, first):
            try:
                fields = orjson.loads(line)
                found = [fields[key] for key in self._keys]
                usable = all(type(text) is str for text in found) and not self._may_repeat(line)
            except (orjson.JSONDecodeError, KeyError, TypeError):
                usable = False
            if usable or (line and not line.isspace() and not (reason := self._why_not(line))):
                for texts, text in zip(block.texts, found, strict=True):
                    texts.append(text)
            elif line and not line.isspace():
                start = line[:START].decode("utf-8", errors="replace").strip()
                block.bad.append(BadLine(self._path, number, reason, start))
        return block

    def _may_repeat(self, line: bytes) -> bool:
        return any(line.count(quoted) > 1 for quoted in self._quoted)

    def _why_not(self, line: bytes) -> str:
        if reason := why_not_object(line):
            return reason
        fields = orjson.loads(line)
        reasons = [reason for key in self._keys if (reason := why_not_text(fields, key))]
        return reasons[0] if reasons else _why_repeated(line, self._keys)


def why_not_object(line: bytes) -> str | None:
    """Why a line is no JSON object; None if it is one."""
    try:
        value = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        if isinstance(line, TooLong):
            return f"is longer than {LONGEST_DOCUMENT:,} bytes"
        start = line[:START].decode("utf-8", errors="replace").strip()
        return f"is not JSON ({error}); it starts {start!r}; {_EXPECTED}"
    if not isinstance(value, dict):
        return f"holds a JSON {type(value).__name__}, not an object; {_EXPECTED}"
    return None


def why_not_text(fields: dict[str, Any], key: str) -> str | None:
    """Why there is no text under `key`; None if there is."""
    if key not in fields:
        return f"has no key {key!r}; keys there: {', '.join(fields) or 'none'}"
    if not isinstance(fields[key], str):
        return f"holds {type(fields[key]).__name__} under {key!r}, not a string; name a key that holds text"
    return None


def _why_repeated(line: bytes, keys: Sequence[str]) -> str:
    """Empty if no key is there twice. A tuple stands for an object, so that only objects are looked at."""
    try:
        names = [name for name, _ in json.loads(line, object_pairs_hook=tuple)]
    except RecursionError:
        return "is nested too deeply"
    repeated = [key for key in keys if names.count(key) > 1]
    return f"has key {repeated[0]!r} more than once" if repeated else ""
