"""A run that comes back on another number of ranks computes what it would have computed.

4 ranks (tensor parallelism 2, ZeRO 1), then 2 (ZeRO 2), 1, and 4 again, each asked to stop after three steps;
and the same run undisturbed. Bound: two layouts differ by at most 1e-5 over five steps in fp32
(test_layouts.py derives it: rounding, which Adam makes as large as an update only where a gradient is about
zero). Twelve steps accumulate the differences of as many: 12/5 of that.
"""

import json
from pathlib import Path

import pytest

from tests.conftest import Small
from tests.forked import run_worker
from tests.train.product import metrics

WORKER = Path(__file__).with_name("lives.py")
STEPS = 12
TOLERANCE = 1e-5 * STEPS / 5
SAME = ["train.precision=fp32", f"train.steps={STEPS}", "eval.interval=0", "checkpoint.interval=100"]
FOUR = ["parallel.tp=2", "zero.stage=1"]
# Ranks, and all that is given with them; each in turn.
WORLDS = [
    (4, FOUR),
    (2, ["parallel.tp=1", "zero.stage=2"]),
    (1, ["parallel.tp=1", "zero.stage=2", "train.micro_batch_size=4"]),
    (4, FOUR),
]


@pytest.fixture(scope="module")
def lives(small: Small, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("elastic")
    run = small.overrides(folder / "run") + SAME
    todo: dict[str, dict] = {}
    for number, (ranks, settings) in enumerate(WORLDS, start=1):
        world = {"overrides": run + settings, "world_size": ranks, "started": ranks}
        stop = {"fault": "USR1", "step": 3 * number, "ranks": [0]} if number < len(WORLDS) else {}
        todo[f"life-{number}"] = world | stop
        if number == 1:
            todo["impossible"] = {"overrides": [*run, "parallel.tp=1"], "world_size": 3, "started": 3}
    whole = small.overrides(folder / "whole") + SAME + FOUR
    todo["whole"] = {"overrides": whole, "world_size": 4, "started": 4}
    (folder / "lives.json").write_text(json.dumps(todo))
    run_worker(WORKER, folder, folder / "lives.json")
    return folder


def life(lives: Path, name: str) -> dict:
    return json.loads((lives / f"{name}.json").read_text())


def test_each_goes_on_where_the_one_before_stopped(lives: Path) -> None:
    for number, (ranks, _) in enumerate(WORLDS, start=1):
        found = life(lives, f"life-{number}")
        assert found["codes"] == [0 if number == len(WORLDS) else 75] * ranks, found["output"]
        if number > 1:
            assert f"resuming at step {3 * (number - 1)} from" in found["output"]


def test_the_data_and_their_order_are_the_same(lives: Path) -> None:
    found, whole = metrics(lives / "run"), metrics(lives / "whole")
    for key in ("step", "tokens", "windows", "lr"):
        assert [row[key] for row in found] == [row[key] for row in whole]
    assert len(found) == STEPS


def test_the_losses_are_those_of_the_undisturbed_run(lives: Path) -> None:
    """Also the gradients' norms: a window more or less would change both by far more."""
    found, whole = metrics(lives / "run"), metrics(lives / "whole")
    for key in ("loss", "grad_norm"):
        assert [row[key] for row in found] == pytest.approx([row[key] for row in whole], rel=TOLERANCE)
    assert [row["loss"] for row in found] != pytest.approx([whole[0]["loss"]] * STEPS, rel=100 * TOLERANCE)


def test_a_number_of_ranks_that_does_not_fit_is_refused_with_those_that_do(lives: Path) -> None:
    found = life(lives, "impossible")
    assert found["codes"] == [64] * 3
    assert "train.micro_batch_size * dp = 2 * 3 = 6" in found["output"]
    assert "or start 2 or 4 ranks" in found["output"]
