"""`activation-memory`: measured bytes against what must be kept, counted by hand."""

import pytest

from llama_mcore.benchmark.activation_memory import BARS, OURS_SELECTIVE, measure, summarize
from llama_mcore.benchmark.runner import Result
from llama_mcore.model.config import ModelConfig

S, H, FFN, HEADS = 64, 32, 86, 2
SHAPE = {
    "hidden_size": H,
    "num_attention_heads": HEADS,
    "ffn_hidden_size": FFN,
    "vocab_size": 64,
    "seq_length": S,
}


@pytest.fixture(scope="module")
def result() -> Result:
    return measure(SHAPE)


def test_selective_keeps_what_the_layer_promises(result: Result) -> None:
    """Input, qkv, attention output, residual, fc1 output in bf16; the log-sum-exp of each head in fp32."""
    kept = 2 * S * (H + 3 * H + H + H + 2 * FFN) + 4 * S * HEADS
    assert result.measured["bytes_per_layer"][OURS_SELECTIVE] == kept
    assert result.quantities[OURS_SELECTIVE] == kept / (S * H)


def test_full_keeps_the_input(result: Result) -> None:
    assert result.measured["bytes_per_layer"]["ours, full"] == 2 * S * H


def test_each_recompute_of_megatron_cores_layer_saves_something(result: Result) -> None:
    kept = result.measured["bytes_per_layer"]
    assert kept["mcore, none"] > kept["mcore, selective core_attn"] > kept["mcore, selective core_attn, mlp"]
    assert kept["mcore, selective core_attn"] > kept[OURS_SELECTIVE]


@pytest.mark.parametrize(("kept", "held"), [(23, True), (24, False)])
def test_the_bar(kept: int, held: bool) -> None:
    model = ModelConfig.model_validate({**SHAPE, "num_layers": 2})
    found = summarize(model, {OURS_SELECTIVE: kept * S * H}, {OURS_SELECTIVE: 0})
    assert found.bars == BARS
    assert found.held is held
    assert found.figure == f"selective keeps {kept:.2f} * s*b*h/t bytes per layer"
