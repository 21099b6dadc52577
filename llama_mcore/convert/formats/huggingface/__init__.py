"""Hugging Face's LlamaForCausalLM, or Qwen3ForCausalLM with QK-norm, read and written as a stream.

    config.json                        the model (config.py)
    model.safetensors                  its tensors, or model-00001-of-00002.safetensors, ...
    model.safetensors.index.json       with several files: which tensor is in which
    tokenizer.model, tokenizer.json    the tokenizer (tokenizer.py)

One parameter at a time is in memory.
"""

import json
import re
from collections.abc import Iterator
from functools import reduce
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama_mcore.checkpoint.durable_io import write_file
from llama_mcore.checkpoint.paths import WEIGHT
from llama_mcore.checkpoint.safetensors_io import StoredTensor, TensorStream, read_safetensors
from llama_mcore.convert.folder import name_problems, read_json_object, tokenizer_in
from llama_mcore.convert.formats.huggingface.config import (
    CONFIG,
    generation_config,
    hf_config,
    inexpressible,
    model_of,
)
from llama_mcore.convert.formats.huggingface.tokenizer import tokenizer_files
from llama_mcore.convert.fused_weights import HUGGING_FACE, join
from llama_mcore.convert.model_weights import Weights
from llama_mcore.convert.registry import Advance, Format, WriteOptions, check_named
from llama_mcore.data.tokenizer import Tokenizer
from llama_mcore.errors import CheckpointError, ConfigError, Problem, shown
from llama_mcore.model.config import ModelConfig
from llama_mcore.model.sharding import parameter_shapes

INDEX = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
# A name that leads nowhere else and cannot steer a terminal.
_FILE_NAME = re.compile(r"[^./\\\x00-\x1f\x7f\ud800-\udfff][^/\\\x00-\x1f\x7f\ud800-\udfff]*\.safetensors")
_LONGEST_NAME = 255  # bytes, of Linux


def found_in(path: Path) -> bool:
    return (path / CONFIG).is_file()


def open_folder(folder: Path, model: ModelConfig | None) -> Weights:
    found = HfWeights(folder)
    check_named(model, found.model, folder / CONFIG)
    return found


class HfWeights:
    """`Weights` of a Hugging Face folder, in the dtype of its files; where these differ, in one that can hold
    them all.

    Raises CheckpointError with every tensor that is missing, has another shape, or is not LLaMA's.
    """

    kinds: tuple[str, ...] = (WEIGHT,)
    step = 0

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = read_json_object(folder / CONFIG)
        self.model = model_of(self.config)
        self._tensors = self._find_tensors()
        self._check_tensors()
        self.tokenizer = tokenizer_in(folder)
        self.dtype = reduce(torch.promote_types, {tensor.dtype for tensor in self._tensors.values()})

    def names(self) -> list[str]:
        return list(parameter_shapes(self.model))

    def full(self, name: str, kind: str = WEIGHT) -> Tensor:
        parts = tuple(self._tensors[part].full() for part in HUGGING_FACE.parts(name))
        return join(name, parts, self.model).to(self.dtype)

    def _find_tensors(self) -> dict[str, StoredTensor]:
        found: dict[str, StoredTensor] = {}
        for file_name in self._file_names():
            tensors, _ = read_safetensors(self.folder / file_name)
            if twice := found.keys() & tensors.keys():
                reason = f"is in two files of {self.folder}"
                raise CheckpointError([Problem("tensor", shown(name), reason) for name in sorted(twice)])
            found |= tensors
        return found

    def _file_names(self) -> list[str]:
        """Names of the files; an index may name none outside the folder."""
        path = self.folder / INDEX
        if not path.is_file():
            return [SINGLE_FILE]
        found = read_json_object(path).get("weight_map")
        if not isinstance(found, dict) or not found:
            raise CheckpointError(Problem("weight_map", shown(found), f"names no tensors in {path}"))
        if foreign := [name for name in found.values() if not _lies_beside(name)]:
            reason = f"is in {path}, but does not name a .safetensors file beside it"
            raise CheckpointError(Problem("weight_map", shown(foreign[0]), reason))
        return sorted(set(found.values()))

    def _check_tensors(self) -> None:
        found = self._tensors
        size = sum(tensor.num_bytes for tensor in found.values())
        if self.model.num_layers > len(found) or self.model.num_params() > size:
            reason = f"describes a model that does not fit into its {len(found):,} tensors of {size:,} bytes"
            raise CheckpointError(Problem("file", self.folder / CONFIG, reason))
        expected = HUGGING_FACE.shapes(self.model)
        problems = name_problems(
            expected, [name for name in found if not self._repeats_embedding(name)], self.folder
        )
        problems += [
            Problem(
                "tensor",
                name,
                f"has shape {list(found[name].shape)} in {self.folder}, and {list(shape)} is needed",
            )
            for name, shape in expected.items()
            if name in found and found[name].shape != shape
        ]
        if problems:
            raise CheckpointError(problems)

    def _repeats_embedding(self, name: str) -> bool:
        """True for the output layer of a tied model, which some exporters write too."""
        return self.model.tie_embeddings and name == "lm_head.weight"


def _lies_beside(name: object) -> bool:
    return (
        isinstance(name, str)
        and _FILE_NAME.fullmatch(name) is not None
        and len(name.encode()) <= _LONGEST_NAME
    )


def write(weights: Weights, folder: Path, options: WriteOptions, advance: Advance) -> None:
    """Everything that `from_pretrained` needs. Holds one parameter in memory."""
    if problems := inexpressible(weights.model):
        raise ConfigError(problems)
    tokenizer = Tokenizer(weights.tokenizer) if weights.tokenizer else None
    files = tokenizer_files(tokenizer, weights.model.seq_length) if tokenizer else {}
    _write_json(folder / CONFIG, hf_config(weights.model, options.dtype, tokenizer))
    shards = plan_shards(weights.model, options.dtype, options.max_shard_bytes)
    shapes, tensors = HUGGING_FACE.shapes(weights.model), hf_tensors(weights)
    for file_name, shard in shards.items():
        specs = {name: (options.dtype, shapes[name]) for name in shard}
        # transformers refuses files that do not say which framework they are for
        with TensorStream(folder / file_name, specs, {"format": "pt"}) as stream:
            for name, tensor in islice(tensors, len(shard)):
                stream.add(name, tensor)
                advance(tensor.nbytes)
    if len(shards) > 1:
        _write_json(folder / INDEX, _index(shards))
    _write_json(folder / "generation_config.json", generation_config(weights.model, tokenizer))
    for name, content in files.items():
        write_file(folder / name, [content])


def hf_tensors(weights: Weights) -> Iterator[tuple[str, Tensor]]:
    """Every tensor under its Hugging Face name, in the order of the model."""
    for name in weights.names():
        yield from HUGGING_FACE.split(name, weights.full(name), weights.model)


def plan_shards(model: ModelConfig, dtype: torch.dtype, max_shard_bytes: int) -> dict[str, dict[str, int]]:
    """File name -> (tensor -> its bytes). A tensor over the limit has a file of its own."""
    shards: list[dict[str, int]] = [{}]
    for name, shape in HUGGING_FACE.shapes(model).items():
        size = shape.numel() * dtype.itemsize
        if shards[-1] and sum(shards[-1].values()) + size > max_shard_bytes:
            shards.append({})
        shards[-1][name] = size
    if len(shards) == 1:
        return {SINGLE_FILE: shards[0]}
    return {
        f"model-{number:05d}-of-{len(shards):05d}.safetensors": shard
        for number, shard in enumerate(shards, start=1)
    }


def _index(shards: dict[str, dict[str, int]]) -> dict[str, Any]:
    return {
        "metadata": {"total_size": sum(sum(shard.values()) for shard in shards.values())},
        "weight_map": {name: file_name for file_name, shard in shards.items() for name in shard},
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    write_file(path, [(json.dumps(content, indent=2) + "\n").encode()])


FORMAT = Format(
    name="hf", found_in=found_in, open=open_folder, write=write, is_cut=False, has_optimizer=False
)
