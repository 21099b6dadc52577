"""The only place that reads pickles, in a separate process: `python -m ...sandbox`.

Questions arrive on stdin, answers leave on stdout, each a line of JSON:

    question   {"files": [[path, offset, length or null], ...], "allowed": ["module.Class", ...],
                "bare": whether they are bare pickles}
    answer     {"contents": [...]} or {"refused": index of the file, "reason": text}

torch's own weights-only unpickler builds tensors and plain containers and calls nothing else. Here it makes
tensors without content: only their places in the file are told to the parent. Classes that the question
allows by name become plain records of their fields; the real ones are never imported.

A pickle that torch.save did not write, such as the metadata of torch.distributed.checkpoint, is bare.
Python's unpickler reads it, and finds nothing by name but torch.Size, dtypes and the same plain records.
"""

import io
import json
import math
import os
import pickle
import re
import resource
import struct
import sys
import zipfile
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

MEMORY = 4 << 30
"""Address space that the process may use beyond what it has with torch. Tensors take up none of it."""
_LARGEST_PICKLE = 64 << 20  # an object of 64 bytes may take one byte there
LARGEST_ANSWER = 1 << 27
_DEEPEST = 50
_LARGEST_BARE = 1 << 30
_PER_VALUE = 32  # bytes that JSON puts around it, about
_LOCAL_HEADER, _LENGTHS_AT = 30, 26  # bytes of a zip entry; offset of the lengths of its name and extra field
_LENGTHS = struct.Struct("<HH")
_NOT_ALLOWED = re.compile(r"(?:GLOBAL|global) ([\w.]+)")
_OF_THE_UNPICKLER = re.compile(r"WeightsUnpickler error: (.+?)(?= Check the documentation|$)")
# torch advises to trust the file, which is not passed on
_ADVICE = re.compile("weights.only", re.IGNORECASE)


class Record:
    """Stand-in for an object of an allowed class: its constructor's arguments, and its fields."""

    arguments: tuple[Any, ...] = ()  # the default: most objects are unpickled without a call of __init__

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        self.__dict__.update(state if isinstance(state, dict) else {"state": state})


def main() -> None:
    """Answer each line until there are no more."""
    _limit_memory()
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)


def answer(question: dict[str, Any]) -> dict[str, Any]:
    maker, contents = _Maker(), []
    for index, (path, offset, length) in enumerate(question["files"]):
        try:
            if question["bare"]:
                contents.append(_bare(Path(path), question["allowed"], maker))
            else:
                contents.append(_content(Path(path), offset, length, question["allowed"], maker))
        except Exception as error:
            return {"refused": index, "reason": _reason(error)}
    return {"contents": contents}


def _limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _content(path: Path, offset: int, length: int | None, allowed: list[str], maker: "_Maker") -> Any:
    """The object in a torch.save file, or in a stretch of one, for JSON."""
    with path.open("rb") as file:
        end = os.fstat(file.fileno()).st_size if length is None else offset + length
        part: BinaryIO = io.BufferedReader(_Part(file, offset, end))
        sizes = {offset + begin: min(size, end - offset - begin) for begin, size in _check_archive(part)}
        part.seek(0)
        stand_ins = [(stand_in, name) for name, stand_in in _stand_ins(allowed).items()]
        torch.serialization.clear_safe_globals()  # libraries add classes when they are imported
        with FakeTensorMode(), torch.serialization.safe_globals(stand_ins):  # type: ignore[arg-type]
            found = torch.load(part, map_location="cpu", weights_only=True)
        return maker.plain(found, _Places(offset, sizes))


def _bare(path: Path, allowed: list[str], maker: "_Maker") -> Any:
    """The object in a bare pickle, for JSON."""
    if (size := path.stat().st_size) > _LARGEST_BARE:
        raise ValueError(f"has {size:,} bytes, more than {_LARGEST_BARE:,}")
    with path.open("rb") as file:
        return maker.plain(_BareUnpickler(file, _stand_ins(allowed)).load(), _Places(0, {}))


def _stand_ins(allowed: list[str]) -> dict[str, type[Record]]:
    return {name: type(name.rpartition(".")[2], (Record,), {}) for name in allowed}


class _BareUnpickler(pickle.Unpickler):
    def __init__(self, file: BinaryIO, stand_ins: dict[str, type[Record]]) -> None:
        super().__init__(file)
        self._stand_ins = stand_ins

    def find_class(self, module: str, name: str) -> Any:
        """Everything that a pickle can call: its names are looked up here and never imported."""
        if (found := self._stand_ins.get(f"{module}.{name}")) is not None:
            return found
        found_in_torch = vars(torch).get(name) if module == "torch" else None
        if found_in_torch is torch.Size or isinstance(found_in_torch, torch.dtype):
            return found_in_torch
        raise pickle.UnpicklingError(f"global {module}.{name} is not allowed")


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


def _check_archive(part: BinaryIO) -> list[tuple[int, int]]:
    """Offset and size of the content of each entry.

    torch.save compresses nothing and names nothing twice: a file with either is not its work.
    """
    try:
        entries = zipfile.ZipFile(part).infolist()
    except zipfile.BadZipFile:
        raise ValueError("is not a file that torch.save of torch 1.6 or later wrote, or is damaged") from None
    if any(entry.filename.endswith("/constants.pkl") for entry in entries):
        raise ValueError(
            "is a TorchScript program: load it with torch.jit.load and torch.save its state_dict()"
        )
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise ValueError("holds compressed data, which torch.save does not write")
    if len({entry.filename for entry in entries}) < len(entries):
        raise ValueError("holds two entries of the same name")
    size = sum(entry.file_size for entry in entries if "/data/" not in entry.filename)
    if size > _LARGEST_PICKLE:
        raise ValueError(f"holds {size:,} bytes beside its tensors, more than {_LARGEST_PICKLE:,}")
    return [(_begin(part, entry), entry.file_size) for entry in entries]


def _begin(part: BinaryIO, entry: zipfile.ZipInfo) -> int:
    """Offset after the local header, which may be longer than the directory says."""
    part.seek(entry.header_offset + _LENGTHS_AT)
    return entry.header_offset + _LOCAL_HEADER + sum(_LENGTHS.unpack(part.read(_LENGTHS.size)))


@dataclass(frozen=True)
class _Places:
    """Places in a file where its tensors may be."""

    base: int
    """Byte from which torch counts."""
    sizes: dict[int, int]
    """Offset of the content of each zip entry -> its size."""


class _Maker:
    """Converter of unpickled objects to JSON of bounded size: a few bytes of pickle can stand for more than a
    machine can hold, by repeating one list or text."""

    def __init__(self) -> None:
        self._room = LARGEST_ANSWER

    def plain(self, value: Any, places: _Places, depth: int = 0) -> Any:
        """`value` for JSON; a dict with keys that JSON objects cannot have becomes a list of pairs."""
        if depth > _DEEPEST:
            raise ValueError("is nested too deeply")
        self._take(value)

        def inner(each: Any) -> Any:
            return self.plain(each, places, depth + 1)

        if isinstance(value, torch.Tensor):
            return _where(value, places)
        if isinstance(value, Record):
            fields = {"arguments": list(value.arguments)} | vars(value)
            return {"$record": type(value).__name__, "fields": inner(fields)}
        if isinstance(value, dict):
            if all(isinstance(key, str) and not key.startswith("$") for key in value):
                for key in value:
                    self._take(key)
                return {key: inner(each) for key, each in value.items()}
            return {"$pairs": [[inner(key), inner(each)] for key, each in value.items()]}
        if isinstance(value, list | tuple | set | frozenset):
            return [inner(each) for each in value]
        if isinstance(value, Enum):
            return inner(value.value)
        if value is None or isinstance(value, bool | int | str):
            return value
        if isinstance(value, float):
            return value if math.isfinite(value) else {"$unknown": str(value)}
        if isinstance(value, bytes | bytearray):
            return value.decode("latin-1")
        if isinstance(value, torch.dtype):
            return str(value).removeprefix("torch.")
        return {"$unknown": f"{type(value).__module__}.{type(value).__name__}"}

    def _take(self, value: Any) -> None:
        self._room -= _PER_VALUE + (len(value) if isinstance(value, str | bytes | bytearray) else 0)
        if self._room < 0:
            raise ValueError(f"holds more than {LARGEST_ANSWER:,} bytes of names and values")


def _where(tensor: torch.Tensor, places: _Places) -> dict[str, Any]:
    storage = tensor.untyped_storage()
    begin = getattr(storage, "_checkpoint_offset", None)
    if begin is None or tensor.layout != torch.strided:
        raise ValueError(f"holds a tensor of a kind that cannot be read ({tensor.layout})")
    size, strides = tensor.shape, tensor.stride()
    first, width = tensor.storage_offset(), tensor.element_size()
    if tensor.numel():
        # torch computes places from the layout of its own zip writer if a file claims to have it
        if places.base + begin not in places.sizes:
            raise ValueError("was packed by another program than torch.save: its tensors cannot be found")
        span = 1 + sum((n - 1) * stride for n, stride in zip(size, strides, strict=True))
        # a storage without content grows to the size of the tensor, so the size in the file is what counts
        inside = (first + span) * width <= places.sizes[places.base + begin]
        if min((first, *strides)) < 0 or not inside:
            raise ValueError("holds a tensor that lies outside its storage")
        if tensor.numel() > span:  # its strides let a few bytes stand for any number of elements
            return {"$unknown": "a tensor that repeats its elements"}
    return {
        "$tensor": {
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "shape": list(size),
            "offset": places.base + begin + first * width,
            "stride": None if tensor.is_contiguous() else list(strides),
        }
    }


def _reason(error: Exception) -> str:
    """The message of an error in one line, without torch's advice."""
    text = " ".join(str(error).split())
    if found := _NOT_ALLOWED.search(text):
        return f"needs {found[1]}, which would run code: only tensors and plain values are allowed"
    if _ADVICE.search(text):
        found = _OF_THE_UNPICKLER.search(text)
        text = found[1] if found else ""
        if not text or _ADVICE.search(text):
            text = "is not a file of tensors that torch.save wrote"
    return text[:500] or type(error).__name__


if __name__ == "__main__":
    main()
