"""A wrong number on one of two ranks: every rank knows, no weight takes it up, no checkpoint holds it."""

from typing import Any

import pytest

from tests.support.world import run_ranks
from tests.train.faults import CASES, NORM, config, examine

pytestmark = pytest.mark.process

GOOD = {"skipped": False, "changed": True, "finite": True, "loss_finite": True, "norm_finite": True}
HELD = GOOD | {"skipped": True, "changed": False, "norm_finite": False}

Case = tuple[str, list[dict[str, Any]]]
"""Name, and what each rank found."""


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    name = request.param
    run = config(tmp_path_factory.mktemp("faults") / name, *CASES[name])
    return name, run_ranks(2, examine, run)


def test_a_nan_in_one_ranks_loss_changes_no_weight(case: Case) -> None:
    """Though its gradient would be finite."""
    for found in case[1]:
        assert found["nan_in_the_first_step"] == found["nan_loss"] == HELD | {"loss_finite": False}


def test_an_infinity_in_one_gradient_changes_no_weight(case: Case) -> None:
    for found in case[1]:
        assert found["inf_gradient"] == HELD


def test_training_goes_on_before_and_after(case: Case) -> None:
    for found in case[1]:
        assert found["before"] == found["after"] == GOOD


@pytest.mark.parametrize(("when", "adam_steps"), [("unfinished_state", 0), ("rolled_back", 2)])
def test_an_engine_returns_to_a_checkpoint(case: Case, when: str, adam_steps: int) -> None:
    """Weights, moments and Adam's count of steps, which skipped ones are not part of."""
    for found in case[1]:
        assert found[when] == {"moved": True, "returned": True, "same_step": True, "adam_steps": adam_steps}


def test_a_flipped_bit_in_a_copy_is_found_and_named(case: Case) -> None:
    for found in case[1]:
        assert found["replicas"]["equal"] == []
        flipped = found["replicas"]["flipped"]
        assert len(flipped) == 2  # of two that differ nobody knows which is right
        axis = "tensor" if "tp2" in case[0] else "data"
        for rank, problem in enumerate(flipped):
            assert problem.startswith(f"{NORM} = rank {rank} on ")
            assert f"{axis}-parallel group" in problem


def test_a_state_with_a_nan_is_not_saved(case: Case) -> None:
    for found in case[1]:
        assert "weight of output_layer.weight on rank" in found["save"]["problems"][0]
        assert found["save"]["before"] == found["save"]["after"]
        assert found["save"]["before"] == ["latest", "step-00000001", "step-00000005"]
