"""The parameters of a LLaMA: one table, from which everything that has to know them derives.

Modules, shapes, tensor-parallel splits, initial values, weight decay, gradient sums, counts, memory, names in
other formats. Imports no torch: the planner and the configuration read it too.

    v vocabulary   h hidden   n query heads   g key/value groups   d head width   f ffn
"""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from llama_mcore.model.config import ModelConfig

_LAYER_NAME = "decoder.layers.{{}}.{}.weight"
_LAYER = re.compile(r"(?<=layers\.)\d+(?=\.)")


@dataclass(frozen=True)
class TpSplit:
    """A split over tensor-parallel ranks: along `dim`, in `stride` equal parts, each by itself."""

    dim: int
    stride: int = 1


ROWS, COLUMNS = TpSplit(dim=0), TpSplit(dim=1)


Shape = Callable[["ModelConfig"], tuple[int, ...]]


@dataclass(frozen=True)
class Parameter:
    """One parameter of the model, or the same one of every layer."""

    name: str
    """megatron-core's, with `{}` for the number of the layer."""
    shape: Shape
    """Full shape: [out, in] of a matrix, [width] of a norm."""
    hugging_face: tuple[str, ...]
    """Its names there; several where megatron-core fuses matrices, in the order of FUSED."""
    meta: tuple[str, ...]
    """Its names in Meta's releases; none if Meta's code has no such parameter."""
    transformer_engine: str = ""
    """Its name in megatron-core's checkpoints, where that is the one of Transformer Engine's fused module."""
    split: TpSplit | None = None
    """None: every tensor-parallel rank holds all of it."""
    summed: Literal["sequence_parallel", "always"] | None = None
    """When its gradient must be summed over the tensor-parallel ranks, which each hold all of it: under
    sequence parallelism, if each rank sees its part of the sequence; always, if each sees its own heads."""
    vectors: Callable[["ModelConfig"], int] = lambda model: 1
    """Vectors per token that a norm is applied to; its own heads on each rank if `summed` is always."""
    init: Literal["ones", "normal", "residual"] = "normal"
    """normal: N(0, init_std); residual: the same, divided by sqrt(2 * num_layers), for what is added to the
    residual stream."""
    fused: Literal["qkv", "gate_up"] | None = None
    """Key of FUSED, if other formats hold it in several matrices."""
    is_vocabulary: bool = False
    """Its rows are tokens: formats may pad them."""
    only_if: tuple[str, bool] | None = None
    """Field of ModelConfig and its value in the models that have this parameter; None: all have it."""

    @property
    def is_norm(self) -> bool:
        """A gain rather than a matrix: begins at one, and takes no weight decay unless optim.decay_norms."""
        return self.init == "ones"

    @property
    def is_in_layer(self) -> bool:
        return "{}" in self.name

    def is_in(self, model: "ModelConfig") -> bool:
        return self.only_if is None or getattr(model, self.only_if[0]) == self.only_if[1]

    def size(self, model: "ModelConfig", tp: int = 1) -> int:
        """Number of values on one tensor-parallel rank."""
        return math.prod(self.shape(model)) // (tp if self.split else 1)


FUSED: dict[str | None, tuple[str, ...]] = {"qkv": ("q", "k", "v"), "gate_up": ("gate", "up"), None: ("",)}
"""Parts of a fused parameter."""


def _in_layer(name: str, shape: Shape, hugging_face: str, meta: str, **others: object) -> Parameter:
    """A parameter of every layer, by its module; names without their common ends, separated by spaces."""
    return Parameter(
        _LAYER_NAME.format(name),
        shape,
        tuple(f"model.layers.{{}}.{part}.weight" for part in hugging_face.split()),
        tuple(f"layers.{{}}.{part}.weight" for part in meta.split()),
        **others,  # type: ignore[arg-type]
    )


PARAMETERS: tuple[Parameter, ...] = (
    Parameter(
        "embedding.word_embeddings.weight",
        lambda m: (m.vocab_size, m.hidden_size),  # [v, h]
        hugging_face=("model.embed_tokens.weight",),
        meta=("tok_embeddings.weight",),
        split=ROWS,
        is_vocabulary=True,
    ),
    _in_layer(
        "input_layernorm",
        lambda m: (m.hidden_size,),  # [h]
        hugging_face="input_layernorm",
        meta="attention_norm",
        transformer_engine="self_attention.linear_qkv.layer_norm_weight",
        summed="sequence_parallel",
        init="ones",
    ),
    _in_layer(
        "self_attention.linear_qkv",
        lambda m: (  # [(n + 2g) d, h]
            (m.num_attention_heads + 2 * m.num_query_groups) * m.head_dim,
            m.hidden_size,
        ),
        hugging_face="self_attn.q_proj self_attn.k_proj self_attn.v_proj",
        meta="attention.wq attention.wk attention.wv",
        split=ROWS,
        fused="qkv",
    ),
    _in_layer(
        "self_attention.linear_proj",
        lambda m: (m.hidden_size, m.num_attention_heads * m.head_dim),  # [h, n d]
        hugging_face="self_attn.o_proj",
        meta="attention.wo",
        split=COLUMNS,
        init="residual",
    ),
    _in_layer(
        "self_attention.q_layernorm",
        lambda m: (m.head_dim,),  # [d]
        hugging_face="self_attn.q_norm",
        meta="",
        summed="always",
        vectors=lambda m: m.num_attention_heads,
        init="ones",
        only_if=("qk_norm", True),
    ),
    _in_layer(
        "self_attention.k_layernorm",
        lambda m: (m.head_dim,),  # [d]
        hugging_face="self_attn.k_norm",
        meta="",
        summed="always",
        vectors=lambda m: m.num_query_groups,
        init="ones",
        only_if=("qk_norm", True),
    ),
    _in_layer(
        "pre_mlp_layernorm",
        lambda m: (m.hidden_size,),  # [h]
        hugging_face="post_attention_layernorm",
        meta="ffn_norm",
        transformer_engine="mlp.linear_fc1.layer_norm_weight",
        summed="sequence_parallel",
        init="ones",
    ),
    _in_layer(
        "mlp.linear_fc1",
        lambda m: (2 * m.ffn_hidden_size, m.hidden_size),  # [2 f, h]: gate above up
        hugging_face="mlp.gate_proj mlp.up_proj",
        meta="feed_forward.w1 feed_forward.w3",
        split=TpSplit(dim=0, stride=2),  # each rank needs its rows of both
        fused="gate_up",
    ),
    _in_layer(
        "mlp.linear_fc2",
        lambda m: (m.hidden_size, m.ffn_hidden_size),  # [h, f]
        hugging_face="mlp.down_proj",
        meta="feed_forward.w2",
        split=COLUMNS,
        init="residual",
    ),
    Parameter(
        "decoder.final_layernorm.weight",
        lambda m: (m.hidden_size,),  # [h]
        hugging_face=("model.norm.weight",),
        meta=("norm.weight",),
        summed="sequence_parallel",
        init="ones",
    ),
    Parameter(
        "output_layer.weight",
        lambda m: (m.vocab_size, m.hidden_size),  # [v, h]
        hugging_face=("lm_head.weight",),
        meta=("output.weight",),
        split=ROWS,
        is_vocabulary=True,
        only_if=("tie_embeddings", False),
    ),
)
"""In the order of the model's modules."""
EMBEDDING, FINAL_NORM, OUTPUT = (PARAMETERS[place].name for place in (0, -2, -1))
_BY_NAME = {parameter.name: parameter for parameter in PARAMETERS}


def parameters_of(model: "ModelConfig") -> Iterator[tuple[str, Parameter]]:
    """Name and description of every parameter of a model, in the order of its modules."""
    present = [parameter for parameter in PARAMETERS if parameter.is_in(model)]
    for in_layer, neighbours in groupby(present, lambda parameter: parameter.is_in_layer):
        group = list(neighbours)
        for index in range(model.num_layers if in_layer else 1):
            for parameter in group:
                yield parameter.name.format(index), parameter


def layer_parameters(model: "ModelConfig") -> list[Parameter]:
    """Parameters of one layer, in the order of its modules."""
    return [parameter for parameter in PARAMETERS if parameter.is_in_layer and parameter.is_in(model)]


def layer_parameter(module: str) -> Parameter:
    """The parameter of a layer that `module` holds, such as mlp.linear_fc1."""
    return _BY_NAME[_LAYER_NAME.format(module)]


def parameter_of(name: str) -> Parameter:
    """Description of the parameter called `name` in a model. Raises KeyError if no model has such a name."""
    pattern, _ = pattern_of(name)
    return _BY_NAME[pattern]


def pattern_of(name: str) -> tuple[str, str]:
    """The name with `{}` for the number of its layer, and that number, "" if there is none."""
    found = _LAYER.search(name)
    return (_LAYER.sub("{}", name, count=1), found.group()) if found else (name, "")


def num_params(model: "ModelConfig") -> int:
    """Number of values of all parameters."""
    return sum(_copies(parameter, model) * parameter.size(model) for parameter in PARAMETERS)


def num_multiplied(model: "ModelConfig") -> int:
    """Number of values that each token is multiplied with: all matrices but the embedding.

    An embedding is looked up; a tied one is the output layer's matrix as well, and counts.
    """
    return sum(
        _copies(parameter, model) * parameter.size(model)
        for parameter in PARAMETERS
        if not parameter.is_norm and (model.tie_embeddings or parameter.name != EMBEDDING)
    )


def _copies(parameter: Parameter, model: "ModelConfig") -> int:
    if not parameter.is_in(model):
        return 0
    return model.num_layers if parameter.is_in_layer else 1
