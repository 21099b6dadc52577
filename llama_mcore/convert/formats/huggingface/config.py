"""config.json of Hugging Face: the model that it describes, and how to describe one of ours."""

import json
from typing import Any

import torch

from llama_mcore.convert.formats.huggingface.tokenizer import pad_id
from llama_mcore.data.tokenizer import Tokenizer
from llama_mcore.errors import CheckpointError, Problem, shown
from llama_mcore.model.config import ModelConfig, RopeScaling

CONFIG = "config.json"
_DEFAULT_ROPE_THETA = 10000.0  # of LlamaConfig, where config.json is silent
_MAX_INITIALIZER_RANGE = 1.0  # of LlamaConfig
_MODEL_TYPES = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}
# Keys of config.json that change the computation and have no field in ModelConfig -> the only value that is
# computed here. A missing key has that value too, and so has null, except for `_NOT_NULL`.
_COMPUTED: dict[str, object] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "use_sliding_window": False,  # of Qwen3Config
    "is_encoder_decoder": False,
    # not fields of LlamaConfig, but transformers reads them from any configuration
    "partial_rotary_factor": 1.0,
    "is_causal": True,
    "per_layer_config": None,
    "quantization_config": None,
}
_REMEDIES = {"attention_dropout": "set it to 0.0: it acts in training alone, and here there is none"}
_NOT_NULL = {"hidden_act", "is_causal"}
# Field of RopeScaling -> key of rope_parameters.
_ROPE_SCALING = {
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_seq_length": "original_max_position_embeddings",
}


def hf_config(model: ModelConfig, dtype: torch.dtype, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Content of config.json, with rope and dtype spelled for transformers 5 as well as 4."""
    dtype_name = str(dtype).removeprefix("torch.")
    model_type = "qwen3" if model.qk_norm else "llama"
    return {
        "architectures": [_MODEL_TYPES[model_type]],
        "model_type": model_type,
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
    """Properties of a model that LlamaConfig does not accept."""
    problems = []
    if model.hidden_size % model.num_attention_heads and not model.qk_norm:
        reason = f"must divide hidden_size = {model.hidden_size} for transformers' LlamaConfig"
        problems.append(Problem("model.num_attention_heads", model.num_attention_heads, reason))
    if model.init_std > _MAX_INITIALIZER_RANGE:
        reason = f"must be at most {_MAX_INITIALIZER_RANGE:g} for transformers' LlamaConfig"
        problems.append(Problem("model.init_std", model.init_std, reason))
    return problems


def model_of(config: dict[str, Any]) -> ModelConfig:
    """The model that a config.json describes. Raises CheckpointError for one that our layer does not compute.

    Where config.json states a value twice, the one that transformers 5 reads counts.
    """
    is_qwen3 = config.get("model_type") == "qwen3"
    # where config.json is silent, Qwen3Config has numbers of its own
    derivable = config.__getitem__ if is_qwen3 else config.get
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
            num_query_groups=derivable("num_key_value_heads") or 0,
            head_dim=derivable("head_dim") or 0,
            ffn_hidden_size=config["intermediate_size"],
            vocab_size=config["vocab_size"],
            seq_length=config["max_position_embeddings"],
            norm_eps=config["rms_norm_eps"],
            rope_theta=rope.get("rope_theta", config.get("rope_theta", _DEFAULT_ROPE_THETA)),
            rope_scaling=_rope_scaling(rope) if _rope_type(rope) == "llama3" else None,
            tie_embeddings=config.get("tie_word_embeddings", False),
            qk_norm=is_qwen3,
            init_std=config.get("initializer_range", 0.02),
        )
    except KeyError as error:
        raise CheckpointError(Problem(f"{CONFIG}: {error.args[0]}", "(not given)", "is required")) from None
    except ValueError as error:
        reason = shown(" ".join(str(error).split()))
        raise CheckpointError(Problem("file", CONFIG, f"does not describe a model ({reason})")) from None


def _not_computed(config: dict[str, Any]) -> list[Problem]:
    model_type = config.get("model_type", "llama")
    known = isinstance(model_type, str) and model_type in _MODEL_TYPES
    reason = f"is not supported: only {' and '.join(_MODEL_TYPES)} are"
    problems = [] if known else [Problem(f"{CONFIG}: model_type", shown(model_type), reason)]
    return problems + [
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
    """Settings of rotary embedding that are not computed here; an unknown key might be one."""
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
    # transformers prefers this key outside of rope_parameters
    original = config.get("original_max_position_embeddings")
    if rope_type == "llama3" and original not in (None, rope.get("original_max_position_embeddings")):
        reason = "differs from the one in rope_parameters"
        problems.append(
            Problem(f"{CONFIG}: original_max_position_embeddings", shown(original), reason, "remove one")
        )
    return problems


def _rope_type(rope: dict[str, Any]) -> Any:
    return rope.get("rope_type", rope.get("type", "default"))


def _rope_scaling(rope: dict[str, Any]) -> RopeScaling:
    return RopeScaling(**{ours: rope[theirs] for ours, theirs in _ROPE_SCALING.items()})


def _token_ids(tokenizer: Tokenizer | None) -> dict[str, int | None]:
    """Special tokens of the run's tokenizer; all None where it is unknown."""
    if tokenizer is None:
        return {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    bos = tokenizer.bos if tokenizer.bos >= 0 else None
    return {"bos_token_id": bos, "eos_token_id": tokenizer.eod, "pad_token_id": pad_id(tokenizer)}


def generation_config(model: ModelConfig, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Content of generation_config.json: the defaults of `llama-mcore generate`, until the context is full.
    Without it transformers stops after 20 tokens and always takes the likeliest one."""
    return {
        **_token_ids(tokenizer),
        "do_sample": True,
        "temperature": 0.8,
        "top_p": 0.95,
        "top_k": 0,
        "max_length": model.seq_length,
    }
