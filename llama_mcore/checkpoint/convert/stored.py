"""Tensors where they lie in a file, read as far as they are asked for.

Files are read, not mapped: a file that shrinks is an error and no signal, and what a conversion holds in
memory is what it has read.
"""

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llama_mcore.errors import CheckpointError, Problem, shown
from llama_mcore.small_file import parse_json

SAFETENSORS_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
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

    def read(self, start: int = 0, end: int | None = None) -> Tensor:
        """Elements [start, end) in the order of the file, [end - start], in memory of their own.

        Raises CheckpointError where the file ends before them or cannot be read.
        """
        end = self.shape.numel() if end is None else end
        content = torch.empty(end - start, dtype=self.dtype)
        if content.numel():
            _read_into(content, self.path, self.offset + start * self.dtype.itemsize)
        return content

    def full(self) -> Tensor:
        """All of it in its shape, contiguous."""
        if self.stride is None or not self.shape.numel():
            return self.read().view(self.shape)
        span = 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self.stride, strict=True))
        return self.read(0, span).as_strided(self.shape, self.stride).contiguous()


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

    The library checks the file: that its header is bounded and its tensors lie side by side, each once.
    Raises CheckpointError for a file that it refuses and for dtypes other than BF16, F16 and F32.
    """
    try:
        if path.exists() and not path.is_file():
            raise OSError("it is not a regular file")
        with safe_open(path, framework="pt") as opened:
            names, metadata = list(opened.keys()), opened.metadata() or {}
        header, begin = _header(path)
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(Problem("file", path, f"cannot be read ({shown(error)})")) from None
    problems = [
        Problem("tensor", shown(name), f"is {shown(found)}, not one of {', '.join(SAFETENSORS_DTYPES)}")
        for name in names
        if (found := header[name]["dtype"]) not in SAFETENSORS_DTYPES
    ]
    if problems:
        raise CheckpointError(problems)
    return {name: _stored(path, begin, header[name]) for name in names}, metadata


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """The JSON header, and where the tensors begin. Only for a file that the library has accepted."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        return parse_json(file.read(size)), 8 + size


def _stored(path: Path, begin: int, entry: dict[str, Any]) -> StoredTensor:
    dtype, shape = SAFETENSORS_DTYPES[entry["dtype"]], torch.Size(entry["shape"])
    start, end = entry["data_offsets"]
    if end - start != math.prod(shape) * dtype.itemsize:
        raise CheckpointError(Problem("file", path, "was exchanged while it was opened"))
    return StoredTensor(path, begin + start, dtype, shape)
