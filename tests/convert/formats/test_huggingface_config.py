"""Every field of transformers' LlamaConfig that changes what is computed is carried or refused."""

import dataclasses
import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import LlamaConfig, Qwen3Config

from llama_mcore.checkpoint.paths import WEIGHT
from llama_mcore.convert.convert import convert
from llama_mcore.convert.formats import huggingface
from llama_mcore.convert.formats.huggingface import HfWeights
from llama_mcore.convert.formats.huggingface.config import (
    _COMPUTED,
    CONFIG,
    generation_config,
    hf_config,
    model_of,
)
from llama_mcore.convert.registry import WriteOptions
from llama_mcore.errors import CheckpointError, ConfigError
from llama_mcore.generate.generate import generate
from tests.convert.invented import SHAPES, Invented, everything
from tests.support.errors import refused

PLAIN = hf_config(SHAPES["gqa"], torch.float32, None)
LLAMA3 = hf_config(SHAPES["llama3"], torch.float32, None)
SCALING = LLAMA3["rope_scaling"]
# Field of LlamaConfig -> field of ModelConfig, another value.
CARRIED = {
    "vocab_size": ("vocab_size", 128),
    "hidden_size": ("hidden_size", 128),
    "intermediate_size": ("ffn_hidden_size", 96),
    "num_hidden_layers": ("num_layers", 3),
    "num_attention_heads": ("num_attention_heads", 2),
    "num_key_value_heads": ("num_query_groups", 1),
    "max_position_embeddings": ("seq_length", 32),
    "initializer_range": ("init_std", 0.5),
    "rms_norm_eps": ("norm_eps", 1e-3),
    "tie_word_embeddings": ("tie_embeddings", True),
    "head_dim": ("head_dim", 8),
}
IN_ROPE_PARAMETERS = {"rope_parameters"}
# Of the Python that computes, of classifiers, of generation, or (pretraining_tp) of the order of a sum.
WITHOUT_EFFECT = {
    *("transformers_version", "architectures", "output_hidden_states", "return_dict", "dtype", "use_cache"),
    *("chunk_size_feed_forward", "id2label", "label2id", "problem_type", "pretraining_tp"),
    *("pad_token_id", "bos_token_id", "eos_token_id"),
}
# Of sliding windows, which `use_sliding_window` turns on.
WITHOUT_EFFECT_IN_QWEN3 = {"sliding_window", "max_window_layers", "layer_types"}
OTHERS = {
    "model_type": "mistral",
    "hidden_act": "gelu",
    "attention_bias": True,
    "mlp_bias": True,
    "attention_dropout": 0.1,
    "is_encoder_decoder": True,
    "partial_rotary_factor": 0.5,
    "is_causal": False,
    "per_layer_config": {"0": {"num_key_value_heads": 1}},
    "quantization_config": {"quant_method": "fp8"},
    "use_sliding_window": True,
}


@pytest.mark.parametrize("kind", [LlamaConfig, Qwen3Config])
def test_every_field_is_known(kind: type) -> None:
    found = {field.name for field in dataclasses.fields(kind)}
    known = {*CARRIED, *IN_ROPE_PARAMETERS, *WITHOUT_EFFECT, *_COMPUTED}
    assert found - WITHOUT_EFFECT_IN_QWEN3 <= known
    assert OTHERS.keys() == {"model_type", *_COMPUTED}


@pytest.mark.parametrize("name", ["head_dim", "num_key_value_heads"])
def test_qwen3_has_to_say_what_its_defaults_say_otherwise(name: str) -> None:
    config = hf_config(SHAPES["qk-norm"], torch.float32, None)
    assert config["architectures"] == ["Qwen3ForCausalLM"]
    assert model_of(config) == SHAPES["qk-norm"]
    del config[name]
    with refused(CheckpointError, f"{CONFIG}: {name}", "(not given)", remedy=False):
        model_of(config)


@pytest.mark.parametrize("name", CARRIED)
def test_a_field_is_carried(name: str) -> None:
    ours, value = CARRIED[name]
    assert getattr(model_of(PLAIN), ours) != value
    assert getattr(model_of(PLAIN | {name: value}), ours) == value


@pytest.mark.parametrize("config", [PLAIN, LLAMA3], ids=["plain", "llama3"])
@pytest.mark.parametrize("name", OTHERS)
def test_a_field_is_refused(name: str, config: dict[str, Any]) -> None:
    with refused(CheckpointError, f"{CONFIG}: {name}", OTHERS[name], remedy=name == "attention_dropout"):
        model_of(config | {name: OTHERS[name]})


@pytest.mark.parametrize(
    "name", [name for name in OTHERS if name not in ("model_type", "hidden_act", "is_causal")]
)
def test_null_is_none_of_it(name: str) -> None:
    assert model_of(PLAIN | {name: None}) == SHAPES["gqa"]


@pytest.mark.parametrize("name", ["model_type", "hidden_act", "is_causal"])
def test_null_that_transformers_does_not_take_for_the_default(name: str) -> None:
    with refused(CheckpointError, f"{CONFIG}: {name}", None, remedy=False):
        model_of(PLAIN | {name: None})


ROPES: dict[str, dict[str, Any]] = {
    "neither": {},
    "theta": {"rope_theta": 5e5},
    "parameters": {"rope_parameters": {"rope_type": "default", "rope_theta": 2e4}},
    "parameters and theta": {"rope_parameters": {"rope_theta": 2e4}, "rope_theta": 3e4},
    "scaling": {"rope_scaling": SCALING, "rope_theta": 5e5},
    "the old key": {
        "rope_scaling": {"type": "llama3"} | {k: v for k, v in SCALING.items() if k != "rope_type"}
    },
    "in parameters": {"rope_parameters": SCALING | {"rope_theta": 5e5}},
    "both": {
        "rope_scaling": SCALING | {"factor": 2.0},
        "rope_parameters": {"rope_theta": 5e5},
        "rope_theta": 3e4,
    },
    "the factor said": {"rope_parameters": {"rope_theta": 2e4, "partial_rotary_factor": 1.0}},
    "original length twice": {"rope_scaling": SCALING, "original_max_position_embeddings": 8192},
}
SHAPE = {key: value for key, value in PLAIN.items() if not key.startswith("rope")}


@pytest.mark.parametrize("rope", ROPES)
def test_rope_is_read_as_transformers_reads_it(rope: str) -> None:
    ours = model_of(SHAPE | ROPES[rope])
    theirs = LlamaConfig(**json.loads(json.dumps(SHAPE | ROPES[rope]))).rope_parameters
    assert ours.rope_theta == theirs["rope_theta"]
    assert ("default" if ours.rope_scaling is None else "llama3") == theirs["rope_type"]
    if ours.rope_scaling:
        assert ours.rope_scaling.factor == theirs["factor"]
        assert ours.rope_scaling.original_seq_length == theirs["original_max_position_embeddings"]


@pytest.mark.parametrize("rope_type", ["default", "llama3"])
@pytest.mark.parametrize("spelling", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize(
    ("key", "value"),
    [("partial_rotary_factor", 0.5), ("attention_factor", 2.0), ("full_attention", {"rope_theta": 5e5})],
)
def test_what_would_rotate_otherwise_is_refused(
    rope_type: str, spelling: str, key: str, value: object
) -> None:
    rope = {"rope_type": "default", "rope_theta": 1e4} if rope_type == "default" else SCALING
    with refused(CheckpointError, f"{CONFIG}: rope_parameters.{key}", value, remedy=False):
        model_of(SHAPE | {spelling: rope | {key: value}})


def test_an_original_length_that_transformers_takes_instead_is_refused() -> None:
    with refused(CheckpointError, f"{CONFIG}: original_max_position_embeddings", 4096):
        model_of(SHAPE | {"rope_scaling": SCALING, "original_max_position_embeddings": 4096})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with several files of tensors."""
    (tmp_path / "hf").mkdir()
    options = WriteOptions(torch.float32, (WEIGHT,), max_shard_bytes=50_000)
    huggingface.write(Invented(SHAPES["llama3"], torch.float32), tmp_path / "hf", options, lambda size: None)
    return tmp_path / "hf"


@pytest.mark.parametrize("verify", [True, False])
def test_no_other_model_is_made_of_it(folder: Path, tmp_path: Path, verify: bool) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | {"partial_rotary_factor": 0.5}))
    with refused(CheckpointError, f"{CONFIG}: partial_rotary_factor", 0.5, remedy=False):
        convert(folder, tmp_path / "out", target="hf", verify=verify)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name", ["part one.safetensors", "Gewichte-\u00fc.safetensors", "\u6a21\u578b 1.safetensors"]
)
def test_a_file_may_have_any_name(folder: Path, name: str) -> None:
    index = json.loads((folder / huggingface.INDEX).read_text())
    first = min(index["weight_map"].values())
    (folder / first).rename(folder / name)
    index["weight_map"] = {key: name if file == first else file for key, file in index["weight_map"].items()}
    (folder / huggingface.INDEX).write_text(json.dumps(index))
    expected = everything(Invented(SHAPES["llama3"], torch.float32))
    assert all(torch.equal(tensor, expected[key]) for key, tensor in everything(HfWeights(folder)).items())


@pytest.mark.parametrize(
    "name",
    [
        *(
            "../hf/model.safetensors",
            "/etc/model.safetensors",
            "a/b.safetensors",
            "..safetensors",
            ".a.safetensors",
        ),
        *(
            "a\\b.safetensors",
            "a\0.safetensors",
            "a\n.safetensors",
            "\ud800.safetensors",
            "model.bin",
            "",
            7,
            None,
        ),
        "\u00fc" * 150 + ".safetensors",
    ],
)
def test_a_name_that_leads_elsewhere_is_refused(folder: Path, name: object) -> None:
    index = json.loads((folder / huggingface.INDEX).read_text())
    index["weight_map"]["lm_head.weight"] = name
    (folder / huggingface.INDEX).write_text(json.dumps(index))
    with refused(CheckpointError, "weight_map", remedy=False) as caught:
        HfWeights(folder)
    assert "beside it" in caught.value.problems[0].reason


@pytest.mark.parametrize("found", [None, [], {}, "a"])
def test_an_index_of_nothing_is_refused(folder: Path, found: object) -> None:
    (folder / huggingface.INDEX).write_text(json.dumps({"weight_map": found}))
    with refused(CheckpointError, "weight_map", remedy=False) as caught:
        HfWeights(folder)
    assert "names no tensors" in caught.value.problems[0].reason


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"num_attention_heads": 3, "head_dim": 16}, "model.num_attention_heads"),
        ({"init_std": 2.0}, "model.init_std"),
    ],
)
def test_what_transformers_does_not_take_is_not_written(change: dict, field: str, tmp_path: Path) -> None:
    model = SHAPES["mha"].model_copy(update=change)
    with pytest.raises(StrictDataclassError):  # else the refusal could go
        LlamaConfig(
            **{key: value for key, value in hf_config(model, torch.float32, None).items() if key != "dtype"}
        )
    with refused(ConfigError, field, remedy=False):
        huggingface.write(
            Invented(model), tmp_path, WriteOptions(torch.bfloat16, (WEIGHT,)), lambda size: None
        )
    assert not list(tmp_path.iterdir())


def test_it_samples_as_generate_does() -> None:
    ours = inspect.signature(generate).parameters
    theirs = generation_config(SHAPES["mha"], None)
    assert {name: theirs[name] for name in ("temperature", "top_p")} == {
        name: ours[name].default for name in ("temperature", "top_p")
    }
