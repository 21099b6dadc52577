"""plan/memory.py and plan/activations.py against what training allocates on the CPU, to the byte."""

import json
from pathlib import Path

import pytest

from llama_mcore.plan.activations import rotary_tables, saved_bytes_besides_layers, saved_bytes_per_layer
from llama_mcore.plan.memory import model_state
from tests.forked import run_worker
from tests.plan import allocated
from tests.plan.allocated import DP


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict]:
    """By tensor-parallel ranks: case -> what each rank found."""
    folder = tmp_path_factory.mktemp("allocated")
    run_worker(Path(allocated.__file__), folder)
    return {tp: json.loads((folder / f"{tp}.json").read_bytes()) for tp in DP}


@pytest.mark.parametrize(("tp", "name"), [(tp, name) for tp in DP for name in allocated.states(tp)])
def test_model_state(found: dict[int, dict], tp: int, name: str) -> None:
    run, dp = allocated.run_of(name, tp, DP[tp]), DP[tp]
    expected = model_state(run.model, run.parallel, run.zero, run.train.precision, tp * dp)
    ranks = found[tp][name]
    # Stage 2 in fp32 keeps gradients of whole parameters: ranks differ, and the fullest counts.
    assert [max(parts) for parts in zip(*ranks, strict=True)] == list(vars(expected).values())


@pytest.mark.parametrize(("tp", "name"), [(tp, name) for tp in DP for name in allocated.savings(tp)])
def test_what_a_forward_keeps(found: dict[int, dict], tp: int, name: str) -> None:
    layout, recompute, precision, tied = name.split("/")
    model = allocated.model_of(recompute=recompute, tie_embeddings=tied == "tied")
    value = {"bf16": 2, "fp32": 4}[precision]
    shape = (model, tp, layout == "sp-on", allocated.SEQUENCES)
    layers = model.num_layers * saved_bytes_per_layer(*shape, model.recompute, value)
    tables = rotary_tables(model) if model.recompute == "none" else 0
    expected = layers + saved_bytes_besides_layers(*shape, value) + tables
    assert found[tp][name] == [expected] * (tp * DP[tp])
