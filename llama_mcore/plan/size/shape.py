"""LLaMA-like shapes for a number of parameters: a near preset, else a constructed one. Imports no torch."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from llama_mcore.model.config import PRESETS, ModelConfig

PRESET_WITHIN = 0.05
"""Largest relative difference at which a preset is used for a size: cost is flat around its minimum."""
_WIDTHS = [*range(256, 2048, 256), *range(2048, 65_537, 512)]
"""Heads of 64 below 2,048, of 128 from there on: their number and ffn divide by tensor parallelism of 4."""
_WIDTH_PER_LAYER = (48, 192)
_ASPECT_WEIGHT = (
    0.05  # against the logarithm of the size: proportions matter little (Kaplan et al., section 3.1)
)


@dataclass(frozen=True)
class Shape:
    """A model, and the name of its preset, if it is one."""

    model: ModelConfig
    preset: str | None = None

    @property
    def params(self) -> int:
        return self.model.num_params()

    @property
    def fields(self) -> dict[str, int]:
        """Fields that distinguish it from other models of LLaMA's proportions."""
        model = self.model
        return {
            "num_layers": model.num_layers,
            "hidden_size": model.hidden_size,
            "num_attention_heads": model.num_attention_heads,
        }

    @property
    def arguments(self) -> list[str]:
        """Arguments that name it to `plan layout` and `benchmark step`."""
        if self.preset:
            return ["--model", self.preset]
        return [
            part
            for name, value in self.fields.items()
            for part in ("--" + name.replace("_", "-"), str(value))
        ]

    def describe(self) -> str:
        model = self.model
        proportions = (
            f"{model.num_layers} layers, hidden {model.hidden_size:,}, {model.num_attention_heads} heads, "
            f"ffn {model.ffn_hidden_size:,}"
        )
        return f"preset {self.preset}: {proportions}" if self.preset else proportions


def nearest_shape(params: float, fits: Callable[[float], bool] = lambda params: True) -> Shape | None:
    """The shape nearest to so many parameters, among those whose own number `fits`; None if none is near.

    Presets of Llama 2 and 3 are left out: their sequence length and vocabulary are not 2,048 and 32,000.
    """
    presets = [Shape(ModelConfig.model_validate(PRESETS[name]), name) for name in ("7b", "13b", "33b", "65b")]
    near = [shape for shape in presets if _distance(shape.params, params) < math.log(1 + PRESET_WITHIN)]
    constructed = sorted(_constructed(params), key=lambda model: _score(model, params))
    for shape in [*near, *(Shape(model) for model in constructed)]:
        if fits(shape.params):
            return shape
    return None


def _constructed(params: float) -> Iterator[ModelConfig]:
    """Shapes of an even number of layers within 20 % of the size."""
    for hidden in _WIDTHS:
        one, two = (_model(layers, hidden).num_params() for layers in (1, 2))
        ideal = 1 + (params - one) / (two - one)
        for layers in (2 * math.floor(ideal / 2), 2 * math.floor(ideal / 2) + 2):
            low, high = _WIDTH_PER_LAYER
            if layers >= 2 and low * layers <= hidden <= high * layers:
                model = _model(layers, hidden)
                if _distance(model.num_params(), params) < math.log(1.2):
                    yield model


def _model(layers: int, hidden: int) -> ModelConfig:
    heads = hidden // (64 if hidden < 2048 else 128)
    return ModelConfig(num_layers=layers, hidden_size=hidden, num_attention_heads=heads)


def _distance(params: float, wanted: float) -> float:
    return abs(math.log(params / wanted))


def _score(model: ModelConfig, params: float) -> float:
    """Distance from the wanted size and from LLaMA's proportions; the smaller, the better."""
    # width per layer in LLaMA: 128 at 7B and 13B, 111 at 33B, 102 at 65B
    wanted = 128 if params < 20e9 else 105
    aspect = abs(math.log(model.hidden_size / model.num_layers / wanted))
    return _distance(model.num_params(), params) + _ASPECT_WEIGHT * aspect
