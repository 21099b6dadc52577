"""Keys of a megatron-core checkpoint: the names that GPTModel.sharded_state_dict gives to parameters.

Either one tensor holds a parameter of all layers, stacked along a first dimension, under a key without the
number of the layer; or each layer has its own tensor and key (`non_homogeneous_layers`). The norms before a
layer's matrices have the names of Transformer Engine's fused modules, whatever computes them
(`sharded_state_dict_keys_map` of get_gpt_layer_local_spec).
"""

import re
from collections.abc import Iterator

from llama_mcore.checkpoint.paths import KINDS
from llama_mcore.model.config import ModelConfig
from llama_mcore.model.parameters import PARAMETERS, layer_parameters

CONFIG = "metadata.json"
CONTENT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
"""Content of CONFIG (dist_checkpointing/core.py)."""

OPTIMIZER = dict(
    zip(
        KINDS, ("optimizer.state.param", "optimizer.state.exp_avg", "optimizer.state.exp_avg_sq"), strict=True
    )
)
"""Kind -> prefix of a key in the `fully_reshardable` form of the distributed optimizer."""
MASTERS = (OPTIMIZER[KINDS[0]], "optimizer.state.fp32_param")
"""Prefixes of master weights: of the distributed optimizer, and of Float16OptimizerWithFloat16Params."""

EXTRA_STATES = ("decoder.final_layernorm._extra_state",)

_FUSED_NORMS = {
    parameter.name.removeprefix("decoder.layers.{}."): parameter.transformer_engine
    for parameter in PARAMETERS
    if parameter.transformer_engine
}
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
Source = tuple[str, int | None]
"""A key, and an index into the first dimension of its tensor (None: the whole tensor)."""


def layer_extra_states(model: ModelConfig) -> list[str]:
    """Keys of the extra states of a layer's modules, one for each module of Transformer Engine."""
    modules = [
        parameter.name.removeprefix("decoder.layers.{}.").removesuffix(".weight")
        for parameter in layer_parameters(model)
        if not parameter.transformer_engine
    ]
    return [f"decoder.layers.{module}._extra_state" for module in (*modules, "self_attention.core_attention")]


def stacked_key(name: str) -> Source:
    """Place of the parameter with this canonical name in the stacked form."""
    found = _LAYER.fullmatch(name)
    if found is None:
        return name, None
    return f"decoder.layers.{_FUSED_NORMS.get(found[2], found[2])}", int(found[1])


def sources(name: str) -> Iterator[tuple[Source, ...]]:
    """Every form in which a checkpoint may store a parameter: the tensors to concatenate.

    With `singleton_local_shards`, gate and up of linear_fc1 are two tensors (apply_swiglu_sharded_factory).
    """
    found = _LAYER.fullmatch(name)
    if found is None:
        yield ((name, None),)
        return
    layer, inner = found.groups()
    for each in dict.fromkeys((_FUSED_NORMS.get(inner, inner), inner)):
        for key, index in ((f"decoder.layers.{each}", int(layer)), (f"decoder.layers.{layer}.{each}", None)):
            yield ((key, index),)
            yield ((f"{key}_w", index), (f"{key}_v", index))
