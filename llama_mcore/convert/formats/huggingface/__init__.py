"""Hugging Face's LlamaForCausalLM: safetensors and config.json, written and read as a stream."""

import json
import os
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
from llama_mcore.checkpoint.safetensors_io import StoredTensor, read_safetensors
from llama_mcore.convert.formats.huggingface.tokenizer import TOKENIZER_MODEL, pad_id, tokenizer_files
from llama_mcore.convert.fused_weights import join, split
from llama_mcore.convert.json_object import read_json_object
from llama_mcore.convert.model_weights import Weights
from llama_mcore.convert.names import HUGGING_FACE
from llama_mcore.convert.registry import Advance, Format, WriteOptions, check_named
from llama_mcore.convert.safetensors_stream import TensorStream
from llama_mcore.data.tokenizer import Tokenizer
from llama_mcore.errors import CheckpointError, ConfigError, Problem, shown
from llama_mcore.model.config import ModelConfig, RopeScaling
from llama_mcore.model.sharding import parameter_shapes

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
# A name that leads nowhere else and steers no terminal.
_FILE_NAME = re.compile(r"[^./\\\x00-\x1f\x7f\ud800-\udfff][^/\\\x00-\x1f\x7f\ud800-\udfff]*\.safetensors")
_LONGEST_NAME = 255  # bytes, of Linux
_DEFAULT_ROPE_THETA = 10000.0  # of LlamaConfig, where config.json is silent
_MAX_INITIALIZER_RANGE = 1.0  # of LlamaConfig
# What config.json may say of the computation that ModelConfig has no field for: key -> the only value that is
# computed here. Absent is that value too, and null but for `_NOT_NULL`. Any other would be another model.
_COMPUTED: dict[str, object] = {
    "model_type": "llama",
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "is_encoder_decoder": False,
    # no fields of LlamaConfig, but what transformers reads from any configuration
    "partial_rotary_factor": 1.0,
    "is_causal": True,
    "per_layer_config": None,
    "quantization_config": None,
}
_REMEDIES = {"attention_dropout": "set it to 0.0: it acts in training only, and this trains without"}
_NOT_NULL = {"model_type", "hidden_act", "is_causal"}
# RopeScaling's fields -> theirs.
_ROPE_SCALING = {
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_seq_length": "original_max_position_embeddings",
}


def write(weights: Weights, folder: Path, options: WriteOptions, advance: Advance) -> None:
    """Everything that `from_pretrained` needs. Holds one parameter in memory."""
    if problems := inexpressible(weights.model):
        raise ConfigError(problems)
    tokenizer = Tokenizer(weights.tokenizer) if weights.tokenizer else None
    files = tokenizer_files(tokenizer, weights.model.seq_length) if tokenizer else {}
    _write_json(folder / CONFIG, hf_config(weights.model, options.dtype, tokenizer))
    shards = plan_shards(weights.model, options.dtype, options.max_shard_bytes)
    shapes, tensors = hf_shapes(weights.model), hf_tensors(weights)
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
        yield from zip(HUGGING_FACE.parts(name), split(name, weights.full(name), weights.model), strict=True)


def hf_shapes(model: ModelConfig) -> dict[str, torch.Size]:
    """Shape of every tensor under its Hugging Face name, in the order of `hf_tensors`."""
    return {
        part: tensor.shape
        for name, shape in parameter_shapes(model).items()
        for part, tensor in zip(
            HUGGING_FACE.parts(name), split(name, torch.empty(shape, device="meta"), model), strict=True
        )
    }


def plan_shards(model: ModelConfig, dtype: torch.dtype, max_shard_bytes: int) -> dict[str, dict[str, int]]:
    """File name -> (tensor -> its bytes). A tensor over the limit has a file of its own."""
    shards: list[dict[str, int]] = [{}]
    for name, shape in hf_shapes(model).items():
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


def hf_config(model: ModelConfig, dtype: torch.dtype, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """config.json. Rope and dtype are spelled as transformers 5 writes them and as 4 reads them."""
    dtype_name = str(dtype).removeprefix("torch.")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_query_groups,
        "head_dim": model.head_dim,
        "vocab_size": model.vocab_size,
        "max_position_embeddings": model.seq_length,
        "hidden_act": "silu",
        "rms_norm_eps": model.norm_eps,
        **_hf_rope(model),
        "tie_word_embeddings": model.tie_embeddings,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "initializer_range": model.init_std,
        "dtype": dtype_name,
        "torch_dtype": dtype_name,
        "use_cache": True,
        **_token_ids(tokenizer),
    }


def _hf_rope(model: ModelConfig) -> dict[str, Any]:
    """transformers 5 reads `rope_parameters`, 4 reads `rope_theta` and `rope_scaling`."""
    kind: dict[str, Any] = {"rope_type": "default"}
    if model.rope_scaling:
        kind = {"rope_type": "llama3"}
        kind |= {theirs: getattr(model.rope_scaling, ours) for ours, theirs in _ROPE_SCALING.items()}
    return {
        "rope_parameters": {**kind, "rope_theta": model.rope_theta},
        "rope_theta": model.rope_theta,
        "rope_scaling": kind if model.rope_scaling else None,
    }


def inexpressible(model: ModelConfig) -> list[Problem]:
    """What of a model LlamaConfig does not take."""
    problems = []
    if model.hidden_size % model.num_attention_heads:
        reason = (
            f"does not divide hidden_size = {model.hidden_size}, which transformers' LlamaConfig asks for"
        )
        problems.append(Problem("model.num_attention_heads", model.num_attention_heads, reason))
    if model.init_std > _MAX_INITIALIZER_RANGE:
        reason = f"is over {_MAX_INITIALIZER_RANGE:g}, the most that transformers' LlamaConfig takes"
        problems.append(Problem("model.init_std", model.init_std, reason))
    return problems


def model_of(config: dict[str, Any]) -> ModelConfig:
    """The model that a config.json describes. Raises CheckpointError for what our layer does not compute.

    Where config.json says a thing twice, what transformers 5 takes counts.
    """
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise CheckpointError(Problem(f"{CONFIG}: rope_parameters", shown(rope), "must be an object"))
    if problems := _not_computed(config) + _not_rotated(rope, config):
        raise CheckpointError(problems)
    try:
        return ModelConfig(
            num_layers=config["num_hidden_layers"],
            hidden_size=config["hidden_size"],
            num_attention_heads=config["num_attention_heads"],
            num_query_groups=config.get("num_key_value_heads") or 0,
            head_dim=config.get("head_dim") or 0,
            ffn_hidden_size=config["intermediate_size"],
            vocab_size=config["vocab_size"],
            seq_length=config["max_position_embeddings"],
            norm_eps=config["rms_norm_eps"],
            rope_theta=rope.get("rope_theta", config.get("rope_theta", _DEFAULT_ROPE_THETA)),
            rope_scaling=_rope_scaling(rope) if _rope_type(rope) == "llama3" else None,
            tie_embeddings=config.get("tie_word_embeddings", False),
            init_std=config.get("initializer_range", 0.02),
        )
    except KeyError as error:
        raise CheckpointError(Problem(f"{CONFIG}: {error.args[0]}", "(not given)", "is required")) from None
    except ValueError as error:
        reason = shown(" ".join(str(error).split()))
        raise CheckpointError(Problem("file", CONFIG, f"does not describe a model ({reason})")) from None


def _not_computed(config: dict[str, Any]) -> list[Problem]:
    return [
        Problem(
            f"{CONFIG}: {key}",
            shown(config[key]),
            f"is not supported: only {json.dumps(value)} is",
            _REMEDIES.get(key, ""),
        )
        for key, value in _COMPUTED.items()
        if config.get(key, value) != value and not (config[key] is None and key not in _NOT_NULL)
    ]


def _not_rotated(rope: dict[str, Any], config: dict[str, Any]) -> list[Problem]:
    """What of rotary embedding is computed otherwise here. A key that is not known might change it."""
    rope_type = _rope_type(rope)
    if rope_type not in ("default", "llama3"):
        reason = "is not supported: only default and llama3 are"
        return [Problem(f"{CONFIG}: rope_type", shown(rope_type), reason)]
    known = {
        "rope_type": rope_type,
        "type": rope.get("type"),  # rope_type counts where both are there
        "rope_theta": rope.get("rope_theta"),
        "partial_rotary_factor": 1.0,
    }
    if rope_type == "llama3":
        known |= {key: rope.get(key) for key in _ROPE_SCALING.values()}
    problems = [
        Problem(f"{CONFIG}: rope_parameters.{shown(key)}", shown(value), f"is not supported for {rope_type}")
        for key, value in rope.items()
        if value is not None and value != known.get(key)
    ]
    # of the configuration itself it goes before that of rope_parameters
    original = config.get("original_max_position_embeddings")
    if rope_type == "llama3" and original not in (None, rope.get("original_max_position_embeddings")):
        reason = "is not that of rope_parameters"
        problems.append(
            Problem(f"{CONFIG}: original_max_position_embeddings", shown(original), reason, "remove one")
        )
    return problems


def _rope_type(rope: dict[str, Any]) -> Any:
    return rope.get("rope_type", rope.get("type", "default"))


def _rope_scaling(rope: dict[str, Any]) -> RopeScaling:
    return RopeScaling(**{ours: rope[theirs] for ours, theirs in _ROPE_SCALING.items()})


class HfWeights:
    """`Weights` of a Hugging Face folder, in the dtype of its files; in one that holds all of them where they
    differ.

    Raises CheckpointError with every tensor that is missing, of another shape, or not LLaMA's.
    """

    kinds: tuple[str, ...] = (WEIGHT,)
    step = 0

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = read_json_object(folder / CONFIG)
        self.model = model_of(self.config)
        self._tensors = self._find_tensors()
        self._check_tensors()
        tokenizer = folder / TOKENIZER_MODEL
        self.tokenizer = tokenizer if tokenizer.is_file() else None
        self.dtype = reduce(torch.promote_types, {tensor.dtype for tensor in self._tensors.values()})

    def names(self) -> list[str]:
        return list(parameter_shapes(self.model))

    def full(self, name: str, kind: str = WEIGHT) -> Tensor:
        parts = tuple(self._tensors[part].full() for part in HUGGING_FACE.parts(name))
        return join(name, parts, self.model).to(self.dtype)

    def _find_tensors(self) -> dict[str, StoredTensor]:
        """By name, from all files."""
        found: dict[str, StoredTensor] = {}
        for file_name in self._file_names():
            tensors, _ = read_safetensors(self.folder / file_name)
            if twice := found.keys() & tensors.keys():
                reason = f"of {self.folder} is in two files"
                raise CheckpointError([Problem("tensor", shown(name), reason) for name in sorted(twice)])
            found |= tensors
        return found

    def _file_names(self) -> list[str]:
        """Of files in this folder: an index may name no other."""
        path = self.folder / INDEX
        if not path.is_file():
            return [SINGLE_FILE]
        found = read_json_object(path).get("weight_map")
        if not isinstance(found, dict) or not found:
            raise CheckpointError(Problem("weight_map", shown(found), f"of {path} names no tensors"))
        if foreign := [name for name in found.values() if not _lies_beside(name)]:
            reason = f"of {path} is the name of no .safetensors file beside it"
            raise CheckpointError(Problem("weight_map", shown(foreign[0]), reason))
        return sorted(set(found.values()))

    def _check_tensors(self) -> None:
        found = self._tensors
        size = sum(tensor.shape.numel() * tensor.dtype.itemsize for tensor in found.values())
        if self.model.num_layers > len(found) or self.model.num_params() > size:
            reason = f"describes a model that {size:,} bytes in {len(found):,} tensors cannot hold"
            raise CheckpointError(Problem("file", self.folder / CONFIG, reason))
        expected = hf_shapes(self.model)
        problems = [
            Problem("tensor", name, f"of {self.folder} is missing") for name in expected if name not in found
        ]
        problems += [
            Problem("tensor", shown(name), f"of {self.folder} is not a part of this model")
            for name in found
            if name not in expected and not self._repeats_embedding(name)
        ]
        problems += [
            Problem("tensor", name, f"has shape {list(found[name].shape)} where {list(shape)} is needed")
            for name, shape in expected.items()
            if name in found and found[name].shape != shape
        ]
        if problems:
            raise CheckpointError(problems)

    def _repeats_embedding(self, name: str) -> bool:
        """Some exporters write the output layer of a tied model too."""
        return self.model.tie_embeddings and name == "lm_head.weight"


def _lies_beside(name: object) -> bool:
    return (
        isinstance(name, str)
        and _FILE_NAME.fullmatch(name) is not None
        and len(name.encode()) <= _LONGEST_NAME
    )


def _token_ids(tokenizer: Tokenizer | None) -> dict[str, int | None]:
    """Of the run's tokenizer; none where it is not known."""
    if tokenizer is None:
        return {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    bos = tokenizer.bos if tokenizer.bos >= 0 else None
    return {"bos_token_id": bos, "eos_token_id": tokenizer.eod, "pad_token_id": pad_id(tokenizer)}


def generation_config(model: ModelConfig, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """generation_config.json: sampling as `llama-mcore generate` samples by default, until the context is
    full. transformers would stop after 20 tokens, and take the likeliest each time."""
    return {
        **_token_ids(tokenizer),
        "do_sample": True,
        "temperature": 0.8,
        "top_p": 0.95,
        "top_k": 0,
        "max_length": model.seq_length,
    }


def _index(shards: dict[str, dict[str, int]]) -> dict[str, Any]:
    return {
        "metadata": {"total_size": sum(sum(shard.values()) for shard in shards.values())},
        "weight_map": {name: file_name for file_name, shard in shards.items() for name in shard},
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(json.dumps(content, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _open(folder: Path, model: ModelConfig | None) -> Weights:
    found = HfWeights(folder)
    check_named(model, found.model, folder / CONFIG)
    return found


FORMAT = Format(
    name="hf",
    found_in=lambda path: (path / CONFIG).is_file(),
    open=_open,
    write=write,
    is_cut=False,
    has_optimizer=False,
)
