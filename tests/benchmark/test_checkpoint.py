"""`checkpoint`: it measures what a run does, leaves nothing behind, and its bars."""

from pathlib import Path

import pytest

from llama_mcore.benchmark.checkpoint import (
    BARS,
    FIRST_STALL,
    HASHED,
    LOAD,
    PLAIN,
    SHAPE,
    STALL,
    STALL_SHARE,
    STEP,
    STEP_BESIDE,
    SYNCHRONOUS,
    VERIFY,
    WRITE_SPEED,
    measure,
    summarize,
)
from llama_mcore.benchmark.runner import describe
from llama_mcore.errors import MissingInputError
from llama_mcore.model.config import ModelConfig
from tests.support.errors import refused

SECONDS = {
    PLAIN: [0.7, 7.0, 0.6],
    HASHED: [1.0],
    SYNCHRONOUS: [2.0],
    FIRST_STALL: [0.4],
    STALL: [0.2],
    STEP: [0.1],
    STEP_BESIDE: [0.2],
    VERIFY: [0.5],
    LOAD: [0.3],
}


@pytest.mark.process
def test_it_runs_and_leaves_nothing(tmp_path: Path) -> None:
    small = SHAPE | {"num_layers": 1, "hidden_size": 64, "ffn_hidden_size": 128, "vocab_size": 256}
    result = measure(rounds=2, folder=tmp_path, shape=small)
    seconds = result.measured["seconds"]
    assert seconds.keys() == SECONDS.keys()
    assert [len(seconds[name]) for name in (PLAIN, HASHED, SYNCHRONOUS, STALL, VERIFY, LOAD)] == [2] * 6
    assert all(time > 0 for times in seconds.values() for time in times)
    assert not list(tmp_path.iterdir())


def test_the_bars_are_ratios_of_medians() -> None:
    result = summarize(ModelConfig.model_validate(SHAPE), SECONDS, others_share=0.0)
    assert result.quantities == {STALL_SHARE: pytest.approx(0.1), WRITE_SPEED: pytest.approx(0.7)}
    assert {bar.quantity for bar in BARS} == result.quantities.keys()
    assert result.held
    assert result.measured["bytes"] == 12 * ModelConfig.model_validate(SHAPE).num_params()
    assert "a save takes 2.00 s and stalls training 10.0% of that" in describe(result).splitlines()[-1]


@pytest.mark.parametrize("worse", [{STALL: [0.21]}, {HASHED: [1.01]}])
def test_what_is_slower_is_not_held(worse: dict[str, list[float]]) -> None:
    assert not summarize(ModelConfig.model_validate(SHAPE), SECONDS | worse, others_share=0.0).held


def test_a_busy_machine_is_said() -> None:
    result = summarize(ModelConfig.model_validate(SHAPE), SECONDS, others_share=0.5)
    assert any("50% of the CPU" in note and "not to be trusted" in note for note in result.notes)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with refused(MissingInputError, "--folder", tmp_path / "none"):
        measure(folder=tmp_path / "none")
