"""Writer of checkpoints that megatron-core's dist_checkpointing loads at any tensor-parallel size.

A chunk is one torch.save blob for each parameter of each layer. torch.distributed.checkpoint's own writer
holds the last tensor of every key until its file is done. So the blobs are written here, one at a time; its
FileSystemWriter adds the metadata.
"""

import io
import json
import os
from pathlib import Path
from typing import IO

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult

from llama_mcore.checkpoint.durable_io import sync_folder, write_file
from llama_mcore.checkpoint.paths import WEIGHT
from llama_mcore.convert.folder import write_tokenizer
from llama_mcore.convert.formats.megatron.config import COMMON, common_state
from llama_mcore.convert.formats.megatron.names import (
    CONFIG,
    CONTENT,
    EXTRA_STATES,
    OPTIMIZER,
    layer_extra_states,
    stacked_key,
)
from llama_mcore.convert.model_weights import Weights
from llama_mcore.convert.registry import Advance, WriteOptions
from llama_mcore.convert.torch_pickle.writer import with_own_storage
from llama_mcore.model.config import ModelConfig


def write(weights: Weights, folder: Path, options: WriteOptions, advance: Advance) -> None:
    """Holds one parameter in memory. Files are about `options.max_shard_bytes` long."""
    common = common_state(weights, options)
    with _BlobWriter(folder, options.max_shard_bytes) as blobs:
        for key in _extra_states(weights.model):
            blobs.add_object(key)
        for name in weights.names():
            for kind in options.kinds:
                tensor = weights.full(name, kind)
                _add(blobs, name, kind, tensor, weights.model, options)
                advance(tensor.nbytes)
        blobs.finish()
    buffer = io.BytesIO()
    torch.save(common, buffer)
    write_file(folder / COMMON, [buffer.getvalue()])
    write_tokenizer(weights, folder)
    # last: for megatron-core this file makes a folder a checkpoint
    write_file(folder / CONFIG, [json.dumps(CONTENT).encode()])
    sync_folder(folder)


def _add(
    blobs: "_BlobWriter", name: str, kind: str, tensor: Tensor, model: ModelConfig, options: WriteOptions
) -> None:
    # an fp32 weight is stored once, under its own key and its master's
    key, layer = stacked_key(name)
    keys = [] if options.kinds == (WEIGHT,) else [f"{OPTIMIZER[kind]}.{key}"]
    if kind == WEIGHT and (options.dtype == tensor.dtype or not keys):
        keys.append(key)
    elif kind == WEIGHT:
        blobs.add([key], tensor.to(options.dtype), layer, model.num_layers)
    blobs.add(keys, tensor, layer, model.num_layers)


def _extra_states(model: ModelConfig) -> list[str]:
    """Keys of the objects that modules keep for fp8, empty here."""
    layers = range(model.num_layers)
    keys = [f"{key}/shard_{i}_{model.num_layers}" for key in layer_extra_states(model) for i in layers]
    return keys + [f"{key}/shard_0_1" for key in EXTRA_STATES]


class _BlobWriter:
    """Files of torch.save blobs and the metadata that describes them; a context manager."""

    def __init__(self, folder: Path, max_file_bytes: int) -> None:
        self._folder, self._max_file_bytes = folder, max_file_bytes
        self._file: IO[bytes] | None = None
        self._name, self._files = "", 0
        self._tensors: dict[str, TensorStorageMetadata] = {}
        self._objects: list[str] = []
        self._written: list[WriteResult] = []

    def __enter__(self) -> "_BlobWriter":
        return self

    def __exit__(self, *_: object) -> None:
        if self._file:
            self._file.close()

    def add(self, keys: list[str], tensor: Tensor, layer: int | None, num_layers: int) -> None:
        """Write one blob under all of these keys; with `layer`, as that layer of a stacked tensor."""
        alone = with_own_storage(tensor)
        chunk = alone if layer is None else alone.unsqueeze(0)
        size = tensor.shape if layer is None else torch.Size((num_layers, *tensor.shape))
        offsets = torch.Size((layer or 0, *[0] * (chunk.dim() - 1)))
        place = self._place(chunk)
        for key in keys:
            properties = TensorProperties(dtype=tensor.dtype)
            described = self._tensors.setdefault(key, TensorStorageMetadata(properties, size, []))
            index = MetadataIndex(key, offsets, len(described.chunks))
            described.chunks.append(ChunkStorageMetadata(offsets, chunk.shape))
            self._written.append(WriteResult(index, place.length, place))

    def add_object(self, key: str) -> None:
        self._objects.append(key)
        place = self._place([None])  # a list, as for the objects of one rank
        self._written.append(WriteResult(MetadataIndex(key), place.length, place))

    def finish(self) -> None:
        """Write the metadata, once all blobs are on the disk."""
        self._close()
        described = {key: BytesStorageMetadata() for key in self._objects} | self._tensors
        FileSystemWriter(self._folder).finish(Metadata(described), [self._written])

    def _place(self, content: object) -> _StorageInfo:
        if self._file is None or self._file.tell() >= self._max_file_bytes:
            self._close()
            self._name = f"__0_{self._files}.distcp"
            self._file = (self._folder / self._name).open("xb")
            self._files += 1
        start = self._file.tell()
        torch.save(content, self._file)
        return _StorageInfo(self._name, start, self._file.tell() - start)

    def _close(self) -> None:
        if self._file:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
