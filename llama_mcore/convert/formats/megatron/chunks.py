"""Folders of torch.distributed.checkpoint: tensors in grids of chunks, each a torch.save blob in a file.

`.metadata` is a bare pickle that says which chunks there are and where; it and the blobs are read in a
separate process (convert/torch_pickle/client.py). All of it is checked before it is used.
"""

import re
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama_mcore.checkpoint.safetensors_io import StoredTensor
from llama_mcore.convert.torch_pickle.client import Stretch, read_bare_pickle, read_stretches
from llama_mcore.errors import CheckpointError, Problem, shown

METADATA = ".metadata"
_COMMON = "common_state/shard_0_1"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_TORCH = "torch.distributed.checkpoint"
_MEGATRON = "megatron.core.dist_checkpointing.strategies"
# Classes that torch 2.x and megatron-core up to 0.19 put into it, most of them in fields that are not used.
_ALLOWED = (
    *(f"{_TORCH}.metadata.{name}" for name in ("Metadata", "MetadataIndex", "TensorStorageMetadata")),
    *(
        f"{_TORCH}.metadata.{name}"
        for name in ("BytesStorageMetadata", "ChunkStorageMetadata", "StorageMeta")
    ),
    *(f"{_TORCH}.metadata.{name}" for name in ("TensorProperties", "_MEM_FORMAT_ENCODING")),
    *(f"{_TORCH}.filesystem.{name}" for name in ("_StorageInfo", "_StoragePrefix")),
    *(f"{_TORCH}.planner.{name}" for name in ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData")),
    *(f"{_MEGATRON}.torch.{name}" for name in ("MCoreMetadata", "MCoreSavePlan")),
    "torch.serialization._get_layout",
    "pathlib.PosixPath",
    "pathlib._local.PosixPath",
)
_FILE_NAME = re.compile(r"[\w-][\w.-]{0,200}\.distcp", re.ASCII)


@dataclass(frozen=True)
class Chunk:
    offsets: tuple[int, ...]
    """Position of its first element in the tensor."""
    sizes: tuple[int, ...]
    file: str
    start: int
    """Byte of the file at which its blob begins."""
    length: int


@dataclass(frozen=True)
class ChunkedTensor:
    dtype: torch.dtype
    shape: torch.Size
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True)
class Metadata:
    tensors: dict[str, ChunkedTensor]
    common: Stretch | None
    """The common state (config.py), a list of one, in megatron-core 0.19 and later."""


class ChunkReader:
    """Reader of the tensors in a folder, which opens all of their blobs once beforehand.

    Raises CheckpointError with each tensor whose chunks are missing, overlap, or lie outside of their file,
    and for a blob that contradicts `.metadata`.
    """

    def __init__(self, folder: Path, tensors: dict[str, ChunkedTensor]) -> None:
        self.tensors = tensors
        _check(folder, tensors)
        places = [(key, chunk) for key, tensor in tensors.items() for chunk in tensor.chunks]
        blobs = read_stretches([(folder / chunk.file, chunk.start, chunk.length) for _, chunk in places])
        self._stored: dict[str, list[StoredTensor]] = {key: [] for key in tensors}
        for (key, chunk), blob in zip(places, blobs, strict=True):
            expected = (tensors[key].dtype, chunk.sizes)
            if not isinstance(blob, StoredTensor) or (blob.dtype, tuple(blob.shape)) != expected:
                reason = f"has no chunk of {shown(key)} at byte {chunk.start} as {METADATA} describes it"
                raise CheckpointError(Problem("file", folder / chunk.file, reason))
            self._stored[key].append(blob)

    def full(self, key: str, index: int | None = None) -> Tensor:
        """A whole tensor, or one element `index` of its first dimension."""
        tensor = self.tensors[key]
        full = torch.empty(tensor.shape if index is None else tensor.shape[1:], dtype=tensor.dtype)
        for chunk, stored in zip(tensor.chunks, self._stored[key], strict=True):
            if index is None:
                _part(full, chunk.offsets, chunk.sizes).copy_(stored.full())
            elif 0 <= (row := index - chunk.offsets[0]) < chunk.sizes[0]:
                _part(full, chunk.offsets[1:], chunk.sizes[1:]).copy_(_slice(stored, row))
        return full


def _part(tensor: Tensor, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> Tensor:
    return tensor[tuple(slice(start, start + size) for start, size in zip(offsets, sizes, strict=True))]


def _slice(stored: StoredTensor, row: int) -> Tensor:
    if stored.stride is not None:
        return stored.full()[row]
    size = prod(stored.shape[1:])
    return stored.read(row * size, (row + 1) * size).view(stored.shape[1:])


def read_metadata(folder: Path) -> Metadata:
    """The tensors in a folder's chunk files.

    Raises CheckpointError for a file of another kind, and for chunks that are in no file of the folder.
    """
    path = folder / METADATA
    found = read_bare_pickle(path, _ALLOWED)
    try:
        places = _places(found["storage_data"])
        described = found["state_dict_metadata"]
        entries = {key: entry for key, entry in described.items() if "chunks" in entry}
        tensors = {key: _tensor(key, entry, places) for key, entry in entries.items()}
        place = places.get((_COMMON, None))
        common = _stretch(_COMMON, place) if place else None
    except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
        reason = f"is not metadata of torch.distributed.checkpoint ({shown(error)})"
        raise CheckpointError(Problem("file", path, reason)) from None
    names = dict.fromkeys(chunk.file for tensor in tensors.values() for chunk in tensor.chunks)
    names |= {common[0]: None} if common else {}
    foreign = [name for name in names if not _FILE_NAME.fullmatch(name)]
    if foreign:
        reason = f"is named in {path}, but does not lie in that folder"
        raise CheckpointError([Problem("file", shown(name), reason) for name in foreign])
    return Metadata(tensors, (folder / common[0], *common[1:]) if common else None)


def _places(storage: dict[Any, dict[str, Any]]) -> dict[Any, dict[str, Any]]:
    """(key, offsets) of each chunk -> its place."""
    indices = [(dict(index), place) for index, place in storage.items()]
    return {(index["fqn"], index.get("offset")): place for index, place in indices}


def _tensor(key: str, entry: dict[str, Any], places: dict[Any, dict[str, Any]]) -> ChunkedTensor:
    shape = _whole(entry["size"])
    return ChunkedTensor(
        DTYPES.get(entry["properties"]["state"][0], torch.uint8),
        torch.Size(shape),
        tuple(_chunk(key, chunk, places, len(shape)) for chunk in entry["chunks"]),
    )


def _chunk(key: str, entry: dict[str, Any], places: dict[Any, dict[str, Any]], dimensions: int) -> Chunk:
    offsets, sizes = _whole(entry["offsets"]), _whole(entry["sizes"])
    if not len(offsets) == len(sizes) == dimensions:
        raise ValueError(f"a chunk of {key} has other dimensions")
    place = places.get((key, offsets))
    if place is None:
        raise ValueError(f"a chunk of {key} at {offsets} is in no file")
    return Chunk(offsets, sizes, *_stretch(key, place))


def _stretch(key: str, place: dict[str, Any]) -> tuple[str, int, int]:
    """Name of the file, first byte and length."""
    if place.get("transform_descriptors"):
        raise ValueError(f"{key} is stored transformed")
    if not isinstance(place["relative_path"], str):
        raise ValueError(f"the file of {key} has no name")
    start, length = _whole([place["offset"], place["length"]])
    return place["relative_path"], start, length


def _whole(numbers: list[Any]) -> tuple[int, ...]:
    if not all(type(number) is int and 0 <= number < 1 << 62 for number in numbers):
        raise ValueError(f"{numbers} are not sizes")
    return tuple(numbers)


def _check(folder: Path, tensors: dict[str, ChunkedTensor]) -> None:
    names = dict.fromkeys(chunk.file for tensor in tensors.values() for chunk in tensor.chunks)
    missing = [
        Problem("file", folder / name, "is missing") for name in names if not (folder / name).is_file()
    ]
    if missing:
        raise CheckpointError(missing)
    sizes = {name: (folder / name).stat().st_size for name in names}
    problems = [
        Problem("tensor", shown(key), why)
        for key, tensor in tensors.items()
        if (why := _wrong_grid(tensor) or _wrong_place(tensor, sizes))
    ]
    if problems:
        raise CheckpointError(problems)


def _wrong_grid(tensor: ChunkedTensor) -> str | None:
    """Reason why the chunks do not cover each element of the tensor once; None if they do.

    They form a grid if along each dimension they begin and end at the same places, and none is there twice.
    """
    if tensor.dtype not in DTYPES.values():
        return f"has a dtype that is not one of {', '.join(DTYPES)}"
    cells = 1
    for dimension, size in enumerate(tensor.shape):
        spans = sorted({(c.offsets[dimension], c.sizes[dimension]) for c in tensor.chunks})
        starts = [start for start, _ in spans]
        ends = [start + length for start, length in spans]
        if [*starts, size] != [0, *ends]:
            return f"has chunks that overlap or do not fill its shape {list(tensor.shape)}"
        cells *= len(spans)
    if cells != len({chunk.offsets for chunk in tensor.chunks}) or cells != len(tensor.chunks):
        return f"lacks chunks of its shape {list(tensor.shape)} or has some twice"
    return None


def _wrong_place(tensor: ChunkedTensor, sizes: dict[str, int]) -> str | None:
    for chunk in tensor.chunks:
        if chunk.start + chunk.length > sizes[chunk.file]:
            return f"ends beyond {chunk.file}"
        if prod(chunk.sizes) * tensor.dtype.itemsize > chunk.length:
            return f"is larger than its {chunk.length:,} bytes in {chunk.file}"
    return None
