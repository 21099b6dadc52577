"""params.json of Meta's releases: the model that it describes, and how to describe one of ours.

Only keys are written that the release whose code computes the model knows (`ModelArgs` in llama/model.py of
facebookresearch/llama and meta-llama/llama3, models/llama3/args.py of meta-llama/llama-models): LLaMA's
loader fails on any other key, Llama 3.1's ignores it.
"""

import math
from itertools import count
from typing import Any

from pydantic import ConfigDict, Field, ValidationError

from llama_mcore.config.section import Section
from llama_mcore.convert.folder import parsed_model
from llama_mcore.errors import CheckpointError, Problem, shown
from llama_mcore.model.config import ModelConfig, RopeScaling
from llama_mcore.model.parameters import PARAMETERS

PARAMS = "params.json"
LLAMA_THETA = 10000.0
_LARGEST = 1 << 31
# (multiple_of, ffn_dim_multiplier) in the releases: LLaMA, Llama 2 70B, Llama 3 8B, 405B, Llama 3.2 1B.
_RELEASED: tuple[tuple[int, float | None], ...] = (
    (256, None),
    (4096, 1.3),
    (1024, 1.3),
    (4096, 1.2),
    (256, 1.5),
)


class MetaParams(Section):
    """Keys that describe a text model. Those without a default are in every release."""

    model_config = ConfigDict(strict=True)

    dim: int = Field(ge=2, lt=_LARGEST)
    n_layers: int = Field(ge=1, lt=_LARGEST)
    n_heads: int = Field(ge=1, lt=_LARGEST)
    n_kv_heads: int | None = Field(default=None, ge=1, lt=_LARGEST)
    vocab_size: int = Field(default=-1, ge=-1, lt=_LARGEST)
    """-1: the tokenizer's, which the embedding shows."""
    multiple_of: int = Field(ge=1, lt=_LARGEST)
    ffn_dim_multiplier: float | None = Field(default=None, gt=0, lt=_LARGEST)
    norm_eps: float = Field(gt=0)
    rope_theta: float = Field(default=LLAMA_THETA, gt=0)
    """LLaMA and Llama 2 lack this key and compute with the default; Llama 3 always has it."""
    use_scaled_rope: bool = False
    max_seq_len: int = Field(default=2048, ge=1, lt=_LARGEST)
    max_batch_size: int = 32
    """Size of Meta's key-value cache."""


def parse_params(content: dict[str, Any]) -> MetaParams:
    """Parsed params.json. Raises CheckpointError with every key that is missing, unknown or mistyped."""
    try:
        params = MetaParams(**content)
    except ValidationError as error:
        raise CheckpointError(
            [
                Problem(
                    f"{PARAMS}: {shown('.'.join(map(str, each['loc'])))}",
                    shown(each["input"]) if each["type"] != "missing" else "(not given)",
                    each["msg"],
                )
                for each in error.errors()
            ]
        ) from None
    heads, kv_heads = params.n_heads, params.n_kv_heads or params.n_heads
    if params.dim % (2 * heads) or heads % kv_heads:
        even = f"must divide dim = {params.dim} into heads of even width"
        reason = f"{even}, and be a multiple of n_kv_heads = {kv_heads}"
        raise CheckpointError(Problem(f"{PARAMS}: n_heads", heads, reason))
    return params


def described_model(
    params: MetaParams, vocab_size: int, *, tie_embeddings: bool, fuller: ModelConfig | None
) -> ModelConfig:
    """The model of a params.json, completed from a `fuller` description of the same model.

    params.json lacks the sequence length, tied embeddings and the values of rope scaling: Llama 3.1's are
    constants of Meta's code, and Llama 3.2 was trained with another factor that it does not state.
    """
    stated: dict[str, Any] = {
        "num_layers": params.n_layers,
        "hidden_size": params.dim,
        "num_attention_heads": params.n_heads,
        "num_query_groups": params.n_kv_heads or params.n_heads,
        "head_dim": params.dim // params.n_heads,
        "ffn_hidden_size": ffn_hidden_size(params.dim, params.multiple_of, params.ffn_dim_multiplier),
        "vocab_size": vocab_size,
        "norm_eps": params.norm_eps,
        "rope_theta": params.rope_theta,
    }
    if (
        fuller
        and all(getattr(fuller, field) == value for field, value in stated.items())
        and (fuller.rope_scaling is not None) == params.use_scaled_rope
    ):
        return fuller
    return parsed_model(
        stated
        | {
            "rope_scaling": RopeScaling() if params.use_scaled_rope else None,
            "seq_length": params.max_seq_len,
            "tie_embeddings": tie_embeddings,
        },
        PARAMS,
    )


def params_of(model: ModelConfig) -> dict[str, Any]:
    """Content of params.json, in the fewest keys, for a model that is not `inexpressible`."""
    multiple_of, multiplier = ffn_rule(model.hidden_size, model.ffn_hidden_size)
    params: dict[str, Any] = {
        "dim": model.hidden_size,
        "n_layers": model.num_layers,
        "n_heads": model.num_attention_heads,
        "multiple_of": multiple_of,
        "norm_eps": model.norm_eps,
        "vocab_size": model.vocab_size,
    }
    if model.num_query_groups != model.num_attention_heads:
        params["n_kv_heads"] = model.num_query_groups
    if multiplier is not None:
        params["ffn_dim_multiplier"] = multiplier
    if is_llama3(model):
        params["rope_theta"] = model.rope_theta
    if model.rope_scaling:
        params["use_scaled_rope"] = True
    return params


def is_llama3(model: ModelConfig) -> bool:
    """True if only Llama 3's code can compute the model: LLaMA's has a single rotation."""
    return model.rope_theta != LLAMA_THETA or model.rope_scaling is not None


def inexpressible(model: ModelConfig) -> list[Problem]:
    """Properties of a model that Meta's code cannot compute."""
    problems = [
        Problem(f"model.{field}", value, f"cannot be computed by Meta's code, which has no {parameter.name}")
        for parameter in PARAMETERS
        if parameter.is_in(model) and not parameter.meta
        for field, value in [parameter.only_if or ("", "")]
    ]
    if model.head_dim * model.num_attention_heads != model.hidden_size or model.head_dim % 2:
        width = f"{model.hidden_size} / {model.num_attention_heads}"
        reason = f"cannot be computed by Meta's code, where it must be {width} and even"
        problems.append(Problem("model.head_dim", model.head_dim, reason))
    if model.rope_scaling and model.rope_scaling != RopeScaling():
        reason = f"cannot be computed by Meta's code, which has only {RopeScaling()}"
        problems.append(Problem("model.rope_scaling", model.rope_scaling, reason))
    return problems


def ffn_hidden_size(dim: int, multiple_of: int, multiplier: float | None) -> int:
    """Width in `FeedForward` of the releases: 2/3 of 4 * dim, times the multiplier, rounded up."""
    hidden = int(2 * (4 * dim) / 3)
    if multiplier is not None:
        hidden = int(multiplier * hidden)
    return multiple_of * math.ceil(hidden / multiple_of)


def ffn_rule(dim: int, ffn: int) -> tuple[int, float | None]:
    """(multiple_of, ffn_dim_multiplier) that give `ffn`.

    Those of a release, or none as multiplier, where possible; else a power of two that divides `ffn` and the
    multiplier with the fewest digits.
    """
    divisors = [1 << power for power in range(8, -1, -1) if ffn % (1 << power) == 0]
    for multiple_of, multiplier in _RELEASED + tuple((each, None) for each in divisors):
        if ffn_hidden_size(dim, multiple_of, multiplier) == ffn:
            return multiple_of, multiplier
    return divisors[0], _shortest_multiplier(dim, ffn, divisors[0])


def _shortest_multiplier(dim: int, ffn: int, multiple_of: int) -> float:
    exact = ffn / int(2 * (4 * dim) / 3)
    for digits in count(1):
        unit = 10**digits
        for candidate in (math.floor(exact * unit) / unit, math.ceil(exact * unit) / unit):
            if candidate > 0 and ffn_hidden_size(dim, multiple_of, candidate) == ffn:
                return candidate
    raise AssertionError("a float between ffn and ffn + 1 has an end")
