"""Write a safetensors file a tensor at a time: the header first, from shapes that are known before.

The library's own writer takes all tensors of a file at once, and so holds them.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from llama_mcore.checkpoint.safetensors_io import DTYPE_NAMES

Spec = tuple[torch.dtype, torch.Size]


class TensorStream:
    """A new file whose tensors are added in the order of `specs`; it is on the disk when the block ends.

    Raises OSError where the disk refuses, and ValueError for a tensor that is not the next one.
    """

    def __init__(
        self, path: Path, specs: Mapping[str, Spec], metadata: Mapping[str, str], *, hashed: bool = False
    ) -> None:
        """`hashed`: compute the SHA-256 beside the writing."""
        self.bytes = 0
        self._sha256 = hashlib.sha256()
        self._expected = iter(specs.items())
        self._hasher = ThreadPoolExecutor(1) if hashed else None
        self._flusher = ThreadPoolExecutor(1)
        self._flushing: Future[None] | None = None
        self._file = path.open("xb", buffering=0)
        self._write(memoryview(_header(specs, metadata)))

    @property
    def sha256(self) -> str:
        return self._sha256.hexdigest()

    def add(self, name: str, tensor: Tensor) -> None:
        expected, (dtype, shape) = next(self._expected)
        if (name, tensor.dtype, tensor.shape) != (expected, dtype, shape):
            raise ValueError(
                f"{name} {tensor.dtype} {list(tensor.shape)} where {expected} {dtype} {list(shape)}"
            )
        self._write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)

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


def _header(specs: Mapping[str, Spec], metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name, (dtype, shape) in specs.items():
        start, end = end, end + shape.numel() * dtype.itemsize
        entries[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8 bytes
    return len(text).to_bytes(8, "little") + text
