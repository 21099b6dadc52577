"""Tensors where they lie in a file, read as far as they are asked for.

Files are read, not mapped: a file that shrinks is an error and no signal, and what a conversion holds in
memory is what it has read.
"""

import math
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama_mcore.errors import CheckpointError, PreflightError, Problem, shown
from llama_mcore.small_file import parse_json

SAFETENSORS_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
_LENGTH_BYTES = 8
_LARGEST_HEADER = 4 << 20
"""Bytes, of thirty thousand tensors; LLaMA's largest model has a thousand. Parsing takes 30 times as much."""
_LARGEST_READ = 1 << 30  # Linux reads at most 2 GiB at a time


@dataclass(frozen=True)
class StoredTensor:
    path: Path
    offset: int
    """Byte of the file where the first element lies."""
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...] | None = None
    """In elements; None if contiguous."""

    @property
    def num_bytes(self) -> int:
        """Of a contiguous one."""
        return self.shape.numel() * self.dtype.itemsize

    def read(self, start: int = 0, end: int | None = None) -> Tensor:
        """Elements [start, end) in the order of the file, [end - start], in memory of their own.

        Raises CheckpointError where the file ends before them or cannot be read, PreflightError where there
        is no room for them.
        """
        end = self.shape.numel() if end is None else end
        content = _room(end - start, self.dtype, self.path)
        if content.numel():
            _read_into(content, self.path, self.offset + start * self.dtype.itemsize)
        return content

    def full(self) -> Tensor:
        """All of it in its shape, contiguous."""
        if self.stride is None or not self.shape.numel():
            return self.read().view(self.shape)
        span = 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self.stride, strict=True))
        return self.read(0, span).as_strided(self.shape, self.stride).contiguous()


def _room(numel: int, dtype: torch.dtype, path: Path) -> Tensor:
    try:
        return torch.empty(numel, dtype=dtype)
    except RuntimeError:  # torch has no error of its own for this
        needed = f"{numel * dtype.itemsize / 1e6:,.0f} MB"
        reason, remedy = f"more, for a tensor of {path}, are not to be had", "end other programs"
        raise PreflightError(Problem("memory", needed, reason, remedy)) from None


def _read_into(content: Tensor, path: Path, offset: int) -> None:
    view = content.view(torch.uint8).numpy().data
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            while view:
                size = os.preadv(descriptor, [view[:_LARGEST_READ]], offset)
                if not size:
                    raise CheckpointError(
                        Problem("file", path, "ends before the tensors that it should hold")
                    )
                view, offset = view[size:], offset + size
        finally:
            os.close(descriptor)
    except OSError as error:
        raise CheckpointError(Problem("file", path, f"cannot be read ({error.strerror})")) from None


def read_safetensors(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """The tensors of a safetensors file by name, and its metadata.

    The library's own reader maps whole files; what it checks of a header is checked here. Raises
    CheckpointError for a header that is longer than the file or 4 MiB, tensors that overlap, leave holes or
    end elsewhere than the file, and dtypes other than BF16, F16 and F32.
    """
    try:
        header, begin, end = _header(path)
        metadata = header.pop("__metadata__", {})
        if not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("its metadata is no text")
        found = {name: _stored(path, begin, name, entry) for name, entry in header.items()}
        _check_places([*found.values()], begin, end)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        reason = getattr(error, "strerror", None) or shown(error)
        raise CheckpointError(Problem("file", path, f"cannot be read ({reason})")) from None
    return found, metadata


def _header(path: Path) -> tuple[dict[str, Any], int, int]:
    """The JSON header, where the tensors begin, and where the file ends."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("it is not a regular file")
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        if length > min(_LARGEST_HEADER, status.st_size - _LENGTH_BYTES):
            raise ValueError(f"its header says to be {length:,} bytes long")
        return parse_json(file.read(length)), _LENGTH_BYTES + length, status.st_size


def _stored(path: Path, begin: int, name: str, entry: dict[str, Any]) -> StoredTensor:
    dtype, shape = SAFETENSORS_DTYPES.get(entry["dtype"]), entry["shape"]
    if dtype is None:
        raise ValueError(f"{name} is {entry['dtype']}, not one of {', '.join(SAFETENSORS_DTYPES)}")
    if not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError(f"{name} has the shape {shape}")
    start, end = entry["data_offsets"]
    if start < 0 or end - start != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{name} does not fill bytes {start} to {end}")
    return StoredTensor(path, begin + start, dtype, torch.Size(shape))


def _check_places(tensors: list[StoredTensor], begin: int, end: int) -> None:
    """Side by side, each byte once."""
    for tensor in sorted(tensors, key=lambda tensor: (tensor.offset, tensor.num_bytes)):
        if tensor.offset != begin:
            raise ValueError(f"its tensors overlap or leave a hole at byte {begin:,}")
        begin += tensor.num_bytes
    if begin != end:
        raise ValueError(f"its tensors end at byte {begin:,} and the file at {end:,}")
