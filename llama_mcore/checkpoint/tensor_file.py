"""Write a safetensors file as a stream, hashing what is written.

The library's own writer gives no hash without reading the file again, and needs all of its bytes in memory
where it gives them back. The format: 8 bytes with the length of a JSON header, the header, the tensors.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, islice
from pathlib import Path

import torch
from torch import Tensor

from llama_mcore.checkpoint.durable_io import write_file

_CHUNK = 16 << 20


def write_tensors(
    path: Path,
    sizes: Mapping[str, int],
    pieces: Iterable[Tensor],
    metadata: Mapping[str, str],
    held: int | None = None,
) -> tuple[int, str]:
    """Write flat fp32 tensors; size and SHA-256 of the file. Raises OSError.

    `sizes`: elements of each tensor, by name. `pieces`: the tensors one after the other, contiguous, on the
    CPU, cut anywhere; the first is made before the file is. `held`: how many pieces, each of at most 16 MiB,
    stay as they are while the next is made; None: all.
    """
    remaining = iter(pieces)
    first = list(islice(remaining, 1))
    content = (chunk for piece in chain(first, remaining) for chunk in _chunks(piece))
    return write_file(path, chain([_header(sizes, metadata)], content), held)


def _chunks(piece: Tensor) -> Iterator[memoryview]:
    content = piece.view(torch.uint8).numpy().data
    for start in range(0, len(content), _CHUNK):
        yield content[start : start + _CHUNK]


def _header(sizes: Mapping[str, int], metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name, numel in sizes.items():
        start, end = end, end + numel * torch.float32.itemsize
        entries[name] = {"dtype": "F32", "shape": [numel], "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8 bytes
    return len(text).to_bytes(8, "little") + text
