"""The one place that reads pickles, in a process of its own: `python -m ...pickled_child`.

It is asked on stdin and answers on stdout, in JSON. It unpickles with torch's own weights-only unpickler,
which builds tensors and plain containers and calls nothing else, and which here makes tensors without
content: where in the file each one lies is all that the parent is told. Classes that the asker allows by name
become plain records of their fields; the real ones are never imported.

    asked      {"files": [[path, offset, length or null], ...], "allowed": ["module.Class", ...]}
    answered   {"contents": [...]} or {"refused": index of the file, "reason": text}
"""

import io
import json
import os
import re
import resource
import sys
import zipfile
from enum import Enum
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

MEMORY_LIMIT = 16 << 30
"""Address space of the process. Tensors take none of it."""
_DEEPEST = 50
_NOT_ALLOWED = re.compile(r"(?:GLOBAL|global) ([\w.]+)")


class Record:
    """Stands for an object of an allowed class: what it was made with, and its fields."""

    arguments: tuple[Any, ...] = ()  # most objects are made without __init__ being called

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        self.__dict__.update(state if isinstance(state, dict) else {"state": state})


def main() -> None:
    asked = json.load(sys.stdin)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    contents = []
    for index, (path, offset, length) in enumerate(asked["files"]):
        try:
            contents.append(_content(Path(path), offset, length, asked["allowed"]))
        except Exception as error:
            json.dump({"refused": index, "reason": _reason(error)}, sys.stdout)
            return
    json.dump({"contents": contents}, sys.stdout)


def _content(path: Path, offset: int, length: int | None, allowed: list[str]) -> Any:
    """The object that a file of torch.save, or a stretch of one, holds, in JSON."""
    with path.open("rb") as file:
        end = os.fstat(file.fileno()).st_size if length is None else offset + length
        part: BinaryIO = io.BufferedReader(_Part(file, offset, end))  # type: ignore[assignment]
        _check_archive(part)
        part.seek(0)
        stand_ins = [(type(name.rpartition(".")[2], (Record,), {}), name) for name in allowed]
        with FakeTensorMode(), torch.serialization.safe_globals(stand_ins):  # type: ignore[arg-type]
            found = torch.load(part, map_location="cpu", weights_only=True)
        return _plain(found, offset, end, depth=0)


class _Part(io.RawIOBase):
    """Bytes [start, end) of a file."""

    def __init__(self, file: BinaryIO, start: int, end: int) -> None:
        self._file, self._start, self._size, self._position = file, start, end - start, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        size = max(0, min(len(buffer), self._size - self._position))
        found = os.preadv(self._file.fileno(), [memoryview(buffer)[:size]], self._start + self._position)
        self._position += found
        return found


def _check_archive(part: BinaryIO) -> None:
    """torch.save compresses nothing and names nothing twice: what does is not its work."""
    try:
        entries = zipfile.ZipFile(part).infolist()
    except zipfile.BadZipFile:
        raise ValueError("is not a file of torch.save since version 1.6, or is damaged") from None
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise ValueError("holds compressed data, which torch.save does not write")
    if len({entry.filename for entry in entries}) < len(entries):
        raise ValueError("holds two entries of one name")


def _plain(value: Any, base: int, end: int, depth: int) -> Any:
    """JSON of what was unpickled. A name that JSON objects cannot have makes a list of pairs of a dict."""
    if depth > _DEEPEST:
        raise ValueError("is nested too deeply")

    def inner(each: Any) -> Any:
        return _plain(each, base, end, depth + 1)

    if isinstance(value, torch.Tensor):
        return {"$tensor": _where(value, base, end)}
    if isinstance(value, Record):
        fields = {"arguments": list(value.arguments)} | vars(value)
        return {"$record": type(value).__name__, "fields": inner(fields)}
    if isinstance(value, dict):
        if all(isinstance(key, str) and not key.startswith("$") for key in value):
            return {key: inner(each) for key, each in value.items()}
        return {"$pairs": [[inner(key), inner(each)] for key, each in value.items()]}
    if isinstance(value, list | tuple | set | frozenset):
        return [inner(each) for each in value]
    if isinstance(value, Enum):
        return inner(value.value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, bytes | bytearray):
        return value.decode("latin-1")
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return {"$unknown": f"{type(value).__module__}.{type(value).__name__}"}


def _where(tensor: torch.Tensor, base: int, end: int) -> dict[str, Any]:
    storage = tensor.untyped_storage()
    begin = getattr(storage, "_checkpoint_offset", None)
    if begin is None or tensor.layout != torch.strided:
        raise ValueError(f"holds a tensor of a kind that cannot be read ({tensor.layout})")
    size, strides = tensor.shape, tensor.stride()
    offset = base + begin + tensor.storage_offset() * tensor.element_size()
    if tensor.numel():
        span = 1 + sum((n - 1) * stride for n, stride in zip(size, strides, strict=True))
        inside = (tensor.storage_offset() + span) * tensor.element_size() <= storage.nbytes()
        if min((0, *strides)) < 0 or not inside or base + begin + storage.nbytes() > end:
            raise ValueError("holds a tensor that lies outside of it")
    return {
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "shape": list(size),
        "offset": offset,
        "stride": None if tensor.is_contiguous() else list(strides),
    }


def _reason(error: Exception) -> str:
    """In a line. What torch says of a class that is not allowed is advice to trust the file."""
    text = " ".join(str(error).split())
    if found := _NOT_ALLOWED.search(text):
        return f"needs {found[1]}, which would run code: only tensors and plain values are read"
    return text[:500] or type(error).__name__


if __name__ == "__main__":
    main()
