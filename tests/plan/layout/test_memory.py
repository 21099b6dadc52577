"""llama_mcore.plan.layout.memory: bytes per rank."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_mcore.distributed.config import ParallelConfig, ZeroConfig
from llama_mcore.model.config import PRESETS, ModelConfig
from llama_mcore.model.sharding import parameter_shapes
from llama_mcore.plan.layout.memory import ModelState, model_state, params_per_rank
from tests.support.models import GROUPED, model_config

SMALL = model_config(GROUPED)
P = SMALL.num_params()


def state(stage: int, precision: str, tp: int = 1, dp: int = 4) -> ModelState:
    return model_state(SMALL, ParallelConfig(tp=tp), ZeroConfig(stage=stage), precision, world_size=tp * dp)


def test_every_weight_but_the_norms_is_split() -> None:
    norms = 5 * 64
    assert params_per_rank(SMALL, 1) == P
    assert params_per_rank(SMALL, 4) == (P - norms) // 4 + norms


@pytest.mark.parametrize(
    ("stage", "precision", "expected"),
    [
        (1, "bf16", ModelState(2 * P, 4 * P, P, 2 * P)),
        (2, "bf16", ModelState(2 * P, P, P, 2 * P)),
        # every parameter of so small a model is also there as a whole
        (3, "bf16", ModelState(2 * P // 4 + 2 * P, P, P, 2 * P)),
        (0, "fp32", ModelState(4 * P, 4 * P, 0, 8 * P)),
        (1, "fp32", ModelState(4 * P, 4 * P, P, 2 * P)),
        (3, "fp32", ModelState(P + 4 * P, P, P, 2 * P)),
    ],
)
def test_bytes_on_four_data_parallel_ranks(stage: int, precision: str, expected: ModelState) -> None:
    assert P % 4 == 0
    assert state(stage, precision) == expected


def test_total_is_the_sum() -> None:
    assert state(1, "bf16", dp=1).total == 18 * P


def test_each_group_is_padded_to_two_values_a_rank() -> None:
    norms = 5 * 64
    padded = sum(6 * -(-values // 6) for values in (P - norms, norms))
    assert padded > P
    assert state(1, "bf16", dp=3) == ModelState(2 * padded, 4 * padded, 4 * padded // 3, 8 * padded // 3)


SMALLEST = st.builds(
    model_config,
    num_layers=st.integers(1, 4),
    hidden_size=st.integers(1, 12),
    num_attention_heads=st.integers(1, 4),
    head_dim=st.sampled_from([2, 4, 6]),
    ffn_hidden_size=st.integers(1, 30),
    vocab_size=st.integers(2, 60),
    tie_embeddings=st.booleans(),
)


@given(model=SMALLEST, dp=st.integers(1, 40))
def test_gradients_that_fp32_stage_2_keeps_are_those_of_the_fullest_rank(model: ModelConfig, dp: int) -> None:
    """Against every rank looked at: it keeps each parameter of which a value is in its part."""
    shapes = list(parameter_shapes(model).values())
    most = 0
    for rank in range(dp):
        kept = 0
        for dims in (2, 1):  # matrices, norms
            group = [shape.numel() for shape in shapes if len(shape) == dims]
            size, start = 2 * -(-sum(group) // (2 * dp)), 0
            for values in group:
                if start < (rank + 1) * size and start + values > rank * size:
                    kept += values
                start += values
        most = max(most, kept)
    assert model_state(model, ParallelConfig(), ZeroConfig(stage=2), "fp32", dp).gradients == 4 * most


def test_65b_as_the_paper_trained_it_fits_one_gpu() -> None:
    model = ModelConfig(**PRESETS["65b"])
    memory = model_state(model, ParallelConfig(tp=8), ZeroConfig(stage=2), "bf16", world_size=2048)
    assert memory.weights == 2 * params_per_rank(model, 8)
    assert 15 * 2**30 < memory.total < 17 * 2**30
