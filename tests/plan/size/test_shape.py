"""llama_mcore.plan.size.shape: LLaMA-like shapes for any number of parameters."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_mcore.model.config import PRESETS, ModelConfig
from llama_mcore.plan.size.shape import nearest_shape


@pytest.mark.parametrize("preset", ["7b", "13b", "33b", "65b"])
@pytest.mark.parametrize("factor", [1.0, 0.96, 1.04])
def test_a_size_near_a_preset_is_the_preset(preset: str, factor: float) -> None:
    model = ModelConfig.model_validate(PRESETS[preset])
    shape = nearest_shape(factor * model.num_params())
    assert shape
    assert (shape.preset, shape.model) == (preset, model)
    assert shape.arguments == ["--model", preset]


@settings(deadline=None)
@given(exponent=st.floats(math.log(1e8), math.log(1e13)))
def test_any_size_has_a_shape_that_can_be_trained(exponent: float) -> None:
    params = math.exp(exponent)
    shape = nearest_shape(params)
    assert shape
    model = shape.model
    assert shape.params == pytest.approx(params, rel=0.06 if params > 1e9 else 0.12)
    assert model.hidden_size == model.num_attention_heads * model.head_dim
    assert model.head_dim in (64, 128)
    assert model.num_attention_heads % 4 == model.ffn_hidden_size % 256 == model.num_layers % 2 == 0
    assert 48 <= model.hidden_size / model.num_layers <= 192


def test_a_constructed_shape_names_its_dimensions() -> None:
    shape = nearest_shape(3e9)
    assert shape
    assert shape.preset is None
    model = shape.model
    assert shape.arguments == [
        "--num-layers",
        str(model.num_layers),
        "--hidden-size",
        str(model.hidden_size),
        "--num-attention-heads",
        str(model.num_attention_heads),
    ]


@pytest.mark.parametrize("params", [1e5, 1e15])
def test_no_shape_is_near_an_absurd_size(params: float) -> None:
    assert nearest_shape(params) is None


def test_shapes_that_do_not_fit_are_passed_over() -> None:
    shape = nearest_shape(6.7e9, fits=lambda params: params > 6.9e9)
    assert shape
    assert shape.preset is None
    assert shape.params > 6.9e9
