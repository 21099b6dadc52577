"""Safetensors files, read and written: the one place that knows how they are laid out.

    8 bytes     length of the header, little-endian
    header      JSON: {"__metadata__": {...}, NAME: {"dtype": ..., "shape": ..., "data_offsets": ...}, ...}
    tensors     side by side to the end of the file; offsets count from the end of the header

The `safetensors` package is not used. Its reader maps files, so that a file that is truncated while it is
read kills the process (SIGBUS) instead of raising an error. Its writer needs all tensors of a file at once
and gives no hash, which a checkpoint computes while the bytes are still in memory.
"""

import hashlib
import json
import math
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from llama_mcore.checkpoint.durable_io import write_file
from llama_mcore.errors import CheckpointError, PreflightError, Problem, shown
from llama_mcore.small_file import parse_json

TensorSpec = tuple[torch.dtype, torch.Size]
SAFETENSORS_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
_METADATA = "__metadata__"
_LENGTH_BYTES = 8
_LARGEST_HEADER = 4 << 20
"""Bytes, enough for thirty thousand tensors; LLaMA's largest model has a thousand. Parsing takes 30 times as
much memory."""
_LARGEST_READ = 1 << 30  # Linux reads at most 2 GiB at a time
_CHUNK = 16 << 20


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file, of any format, which is read as far as it is needed."""

    path: Path
    offset: int
    """Byte of the file at which the first element begins."""
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...] | None = None
    """In elements; None if contiguous."""

    @property
    def num_bytes(self) -> int:
        """Size in the file, if contiguous."""
        return self.shape.numel() * self.dtype.itemsize

    def read(self, start: int = 0, end: int | None = None) -> Tensor:
        """Elements [start, end) in the order of the file, [end - start], in memory of their own.

        Raises CheckpointError where the file ends before them or cannot be read, PreflightError where memory
        does not suffice.
        """
        end = self.shape.numel() if end is None else end
        content = _allocated(end - start, self.dtype, self.path)
        if content.numel():
            _read_into(content, self.path, self.offset + start * self.dtype.itemsize)
        return content

    def full(self) -> Tensor:
        """The whole tensor in its shape, contiguous."""
        if self.stride is None or not self.shape.numel():
            return self.read().view(self.shape)
        span = 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self.stride, strict=True))
        return self.read(0, span).as_strided(self.shape, self.stride).contiguous()


def _allocated(numel: int, dtype: torch.dtype, path: Path) -> Tensor:
    try:
        return torch.empty(numel, dtype=dtype)
    except RuntimeError:  # torch has no error of its own for this
        needed = f"{numel * dtype.itemsize / 1e6:,.0f} MB"
        reason = f"cannot be allocated to read a tensor of {path}"
        raise PreflightError(Problem("memory", needed, reason, "end other programs")) from None


def _read_into(content: Tensor, path: Path, offset: int) -> None:
    view = bytes_of(content)
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            while view:
                size = os.preadv(descriptor, [view[:_LARGEST_READ]], offset)
                if not size:
                    reason = "ends before the tensors that its header describes"
                    raise CheckpointError(Problem("file", path, reason))
                view, offset = view[size:], offset + size
        finally:
            os.close(descriptor)
    except OSError as error:
        raise CheckpointError(Problem("file", path, f"cannot be read ({error.strerror})")) from None


def bytes_of(tensor: Tensor) -> memoryview:
    """Content of a tensor on the CPU, in its own memory if it is contiguous."""
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data


def read_safetensors(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """The tensors of a file by name, and its metadata.

    Raises CheckpointError for a header longer than the file or 4 MiB, tensors that overlap, leave holes or
    end elsewhere than the file, and dtypes other than BF16, F16 and F32.
    """
    try:
        header, begin, end = _read_header(path)
        metadata = header.pop(_METADATA, {})
        if not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("its metadata is not text")
        found = {name: _stored(path, begin, name, entry) for name, entry in header.items()}
        _check_side_by_side([*found.values()], begin, end)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        reason = getattr(error, "strerror", None) or shown(error)
        raise CheckpointError(Problem("file", path, f"cannot be read ({reason})")) from None
    return found, metadata


def header_bytes(specs: Mapping[str, TensorSpec], metadata: Mapping[str, str]) -> bytes:
    """The beginning of a file, up to its first tensor."""
    header: dict[str, object] = {_METADATA: dict(metadata)}
    end = 0
    for name, (dtype, shape) in specs.items():
        start, end = end, end + shape.numel() * dtype.itemsize
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8 bytes
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text


def _read_header(path: Path) -> tuple[dict[str, Any], int, int]:
    """The header, the byte at which the tensors begin, and the size of the file."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("it is not a regular file")
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        if length > min(_LARGEST_HEADER, status.st_size - _LENGTH_BYTES):
            raise ValueError(f"its header claims to be {length:,} bytes long")
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


def _check_side_by_side(tensors: list[StoredTensor], begin: int, end: int) -> None:
    for tensor in sorted(tensors, key=lambda tensor: (tensor.offset, tensor.num_bytes)):
        if tensor.offset != begin:
            raise ValueError(f"its tensors overlap or leave a hole at byte {begin:,}")
        begin += tensor.num_bytes
    if begin != end:
        raise ValueError(f"its tensors end at byte {begin:,} and the file at {end:,}")


def write_tensors(
    path: Path,
    sizes: Mapping[str, int],
    pieces: Iterable[Tensor],
    metadata: Mapping[str, str],
    held: int | None = None,
) -> tuple[int, str]:
    """Write flat fp32 tensors as `pieces` arrive; size and SHA-256 of the file. Raises OSError.

    `sizes`: elements of each tensor, by name. `pieces`: the tensors one after the other, contiguous, on the
    CPU, cut anywhere; the first is made before the file is. `held`: how many pieces, each of at most 16 MiB,
    stay as they are while the next is made; None: all.
    """
    remaining = iter(pieces)
    first = list(islice(remaining, 1))
    header = header_bytes({name: (torch.float32, torch.Size([n])) for name, n in sizes.items()}, metadata)
    content = (chunk for piece in chain(first, remaining) for chunk in _chunks(bytes_of(piece)))
    return write_file(path, chain([header], content), held)


def _chunks(content: memoryview) -> Iterator[memoryview]:
    for start in range(0, len(content), _CHUNK):
        yield content[start : start + _CHUNK]


class TensorStream:
    """A new file whose tensors are added in the order of `specs`; it is on the disk when the block ends.

    Several can be filled side by side. Raises OSError where the disk refuses, and ValueError for a tensor
    that is not the next one.
    """

    def __init__(
        self,
        path: Path,
        specs: Mapping[str, TensorSpec],
        metadata: Mapping[str, str],
        *,
        hashed: bool = False,
    ) -> None:
        """`hashed`: compute the SHA-256 while writing."""
        self.bytes = 0
        self._sha256 = hashlib.sha256()
        self._expected = iter(specs.items())
        self._hasher = ThreadPoolExecutor(1) if hashed else None
        self._flusher = ThreadPoolExecutor(1)
        self._flushing: Future[None] | None = None
        self._file = path.open("xb", buffering=0)
        self._write(memoryview(header_bytes(specs, metadata)))

    @property
    def sha256(self) -> str:
        return self._sha256.hexdigest()

    def add(self, name: str, tensor: Tensor) -> None:
        check_is_next(self._expected, name, tensor)
        self._write(bytes_of(tensor))

    def __enter__(self) -> "TensorStream":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._file:
            for helper in (self._hasher, self._flusher):
                if helper:
                    helper.shutdown()
            if error is None:
                if left := next(self._expected, None):
                    raise ValueError(f"{left[0]} was not added")
                os.fsync(self._file.fileno())

    def _write(self, content: memoryview) -> None:
        hashing = self._hasher.submit(self._sha256.update, content) if self._hasher else None
        self.bytes += len(content)
        while content:
            content = content[self._file.write(content) :]
        if self._flushing is None or self._flushing.done():
            # the disk works while the next tensor is read
            self._flushing = self._flusher.submit(os.fdatasync, self._file.fileno())
        if hashing:
            hashing.result()


def check_is_next(expected: Iterator[tuple[str, TensorSpec]], name: str, tensor: Tensor) -> None:
    """Take the next entry of `expected`. Raises ValueError for a tensor that is another."""
    next_name, (dtype, shape) = next(expected)
    if (name, tensor.dtype, tensor.shape) != (next_name, dtype, shape):
        raise ValueError(
            f"{name} {tensor.dtype} {list(tensor.shape)} where {next_name} {dtype} {list(shape)}"
        )
