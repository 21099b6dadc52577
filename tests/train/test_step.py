"""llama_mcore.train.step through real engines: an update that must not happen, and evaluation."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.forked import run_worker

WORKER = Path(__file__).with_name("steps.py")
CASES = [f"{precision}-zero{stage}" for precision in ("bf16", "fp32") for stage in (1, 2, 3)]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    output = tmp_path_factory.mktemp("steps") / "found.json"
    run_worker(WORKER, output)
    return json.loads(output.read_text())


@pytest.mark.parametrize("case", CASES)
def test_a_gradient_that_is_not_finite_changes_no_weight(results: dict[str, Any], case: str) -> None:
    """The step says so, and the next one goes on."""
    before, with_nan, after = results[case]["steps"]
    good = {"changed": True, "finite": True, "skipped": False, "grad_norm_finite": True}
    assert with_nan == {"changed": False, "finite": True, "skipped": True, "grad_norm_finite": False}
    assert before == after == good


@pytest.mark.parametrize("case", CASES)
def test_evaluation_is_the_mean_and_changes_nothing(results: dict[str, Any], case: str) -> None:
    found = results[case]["evaluation"]
    assert found["found"] == pytest.approx(found["expected"], rel=1e-6)
    assert not found["changed"]
    assert found["training_goes_on"]
