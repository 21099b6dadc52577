"""What autograd keeps per layer, counted on the model in bf16: plan/layout/activations.py is right to the
byte."""

import pytest

from llama_mcore.plan.layout.activations import saved_bytes_per_layer
from tests.model.cases import saved
from tests.model.cases.saved import BATCH, config, names
from tests.model.conftest import OnRanks

pytestmark = pytest.mark.process

CASES = [(tp, name) for tp in (1, 2) for name in names(tp)]


@pytest.mark.parametrize(("tp", "name"), CASES)
def test_bytes_per_layer(on_ranks: OnRanks, tp: int, name: str) -> None:
    shape, layout, recompute = name.split("/")
    expected = saved_bytes_per_layer(config(shape, recompute), tp, layout == "sp-on", BATCH, recompute)
    for kept in on_ranks(saved, tp)[name]:
        assert sum(size_in_bytes for _, _, size_in_bytes in kept) == expected


@pytest.mark.parametrize(("tp", "name"), [case for case in CASES if case[1].endswith("selective")])
def test_selective_keeps_the_named_tensors_and_nothing_else(on_ranks: OnRanks, tp: int, name: str) -> None:
    shape, layout, recompute = name.split("/")
    model = config(shape, recompute)
    s, b, h = model.seq_length, BATCH, model.hidden_size
    local = s // tp if layout == "sp-on" else s
    heads, groups, ffn = (
        size // tp for size in (model.num_attention_heads, model.num_query_groups, model.ffn_hidden_size)
    )
    named = {
        "layer input": ([local, b, h], "bfloat16"),
        "qkv": ([s, b, (heads + 2 * groups) * model.head_dim], "bfloat16"),
        "attention output": ([s, b, heads * model.head_dim], "bfloat16"),
        "log-sum-exp": ([b, heads, s], "float32"),
        "post-attention residual": ([local, b, h], "bfloat16"),
        "fc1 output": ([s, b, 2 * ffn], "bfloat16"),
    }
    for kept in on_ranks(saved, tp)[name]:
        assert sorted((size, dtype) for size, dtype, _ in kept) == sorted(named.values())


@pytest.mark.parametrize("tp", [1, 2])
def test_selective_at_the_proportions_of_7b(on_ranks: OnRanks, tp: int) -> None:
    """At most 23 bytes for each of the layer input's s * b * h values, over the ranks that share them."""
    layout = "sp-on" if tp > 1 else "sp-off"
    model = config("7b-like", "selective")
    bound = 23 * model.seq_length * BATCH * model.hidden_size / tp
    for kept in on_ranks(saved, tp)[f"7b-like/{layout}/selective"]:
        assert 0.9 * bound < sum(size_in_bytes for _, _, size_in_bytes in kept) <= bound
