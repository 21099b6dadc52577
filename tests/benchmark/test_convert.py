"""`convert`: it converts there and back for every format, leaves nothing behind, and its bar."""

from pathlib import Path

import pytest

from llama_mcore.benchmark import convert
from llama_mcore.benchmark.convert import BARS, SLOWEST, Samples, measure, summarize
from llama_mcore.benchmark.runner import describe
from llama_mcore.convert.registry import NAMES
from llama_mcore.model.config import ModelConfig

SMALL = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "ffn_hidden_size": 128,
    "seq_length": 64,
    "vocab_size": 96,
}


@pytest.mark.process
def test_it_runs_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert, "SHAPE", SMALL)
    result = measure(layers=1, rounds=1, folder=tmp_path)
    ways = [f"hf to {name}" for name in NAMES] + [f"{name} to hf" for name in NAMES if name != "hf"]
    assert sorted(row[""] for row in result.table) == sorted(ways)
    assert result.measured["hf to native"]["bytes"] > 4 * ModelConfig(num_layers=1, **SMALL).num_params()
    assert not list(tmp_path.iterdir())


def test_the_bar_is_the_slowest_of_all() -> None:
    found = {"quick": Samples([1.0, 3.0], [0.9, 2.0], 10), "slow": Samples([2.0], [1.2], 10)}
    result = summarize(ModelConfig(num_layers=1, **SMALL), found, [0.5], rounds=2, others_share=0.0)
    assert result.quantities == {SLOWEST: pytest.approx(0.6)}
    assert {bar.quantity for bar in BARS} == result.quantities.keys()
    assert result.held
    assert "slow is the slowest at 60% of cp" in describe(result).splitlines()[-1]
    found["slow"].seconds[0] = 2.1
    assert not summarize(ModelConfig(num_layers=1, **SMALL), found, [0.5], 2, 0.0).held
