"""plan/layout/memory.py and plan/layout/activations.py against what training allocates on the CPU, to the
byte."""

import pytest

from llama_mcore.plan.layout.activations import (
    rotary_tables,
    saved_bytes_besides_layers,
    saved_bytes_per_layer,
)
from llama_mcore.plan.layout.memory import model_state
from tests.plan.layout import allocated
from tests.plan.layout.allocated import DP
from tests.support.models import PADDED, model_config
from tests.support.world import run_ranks

pytestmark = pytest.mark.process
Found = dict[int, list[dict]]


@pytest.fixture(scope="module")
def found() -> Found:
    """Findings of each rank by case, for each number of tensor-parallel ranks."""
    return {tp: run_ranks(tp * dp, allocated.measured, tp) for tp, dp in DP.items()}


@pytest.mark.parametrize(("tp", "name"), [(tp, name) for tp in DP for name in allocated.states(tp)])
def test_model_state(found: Found, tp: int, name: str) -> None:
    run = allocated.run_of(name, tp)
    expected = model_state(run.model, run.parallel, run.zero, run.train.precision, tp * DP[tp])
    ranks = [of_rank[name] for of_rank in found[tp]]
    # Stage 2 in fp32 keeps gradients of whole parameters: ranks differ, and the fullest counts.
    assert [max(parts) for parts in zip(*ranks, strict=True)] == list(vars(expected).values())


@pytest.mark.parametrize(("tp", "name"), [(tp, name) for tp in DP for name in allocated.savings(tp)])
def test_activations_that_a_forward_keeps(found: Found, tp: int, name: str) -> None:
    layout, recompute, precision, tied = name.split("/")
    model = model_config(PADDED, recompute=recompute, tie_embeddings=tied == "tied")
    value = {"bf16": 2, "fp32": 4}[precision]
    shape = (model, tp, layout == "sp-on", allocated.SEQUENCES)
    layers = model.num_layers * saved_bytes_per_layer(*shape, model.recompute, value)
    tables = rotary_tables(model) if model.recompute == "none" else 0
    expected = layers + saved_bytes_besides_layers(*shape, value) + tables
    assert [of_rank[name] for of_rank in found[tp]] == [expected] * (tp * DP[tp])
