"""Write a safetensors file as a stream, hashing what is written.

The library's own writer gives no hash without reading the file again, and needs all of its bytes in memory
where it gives them back. The format: 8 bytes with the length of a JSON header, the header, the tensors.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from llama_mcore.checkpoint.disk import write_file

_CHUNK = 16 << 20


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> tuple[int, str]:
    """Write contiguous fp32 tensors of the CPU; size and SHA-256 of the file. Raises OSError."""
    return write_file(path, _chunks(tensors, metadata))


def _chunks(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Iterator[memoryview]:
    yield memoryview(_header(tensors, metadata))
    for tensor in tensors.values():
        content = tensor.view(-1).view(torch.uint8).numpy().data
        for start in range(0, len(content), _CHUNK):
            yield content[start : start + _CHUNK]


def _header(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32 or not tensor.is_contiguous():
            raise ValueError(f"{name} is {tensor.dtype}, contiguous {tensor.is_contiguous()}")
        start, end = end, end + tensor.nbytes
        entries[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8 bytes
    return len(text).to_bytes(8, "little") + text
