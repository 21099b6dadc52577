"""A run that hangs is ended, explained, and goes on to where an undisturbed one ends.

One run on two ranks, and three lives of it: in the first a thread keeps the interpreter, in the second a read
never returns, the third is left alone.
"""

import json
from pathlib import Path

import pytest

from tests.conftest import Small
from tests.forked import run_worker
from tests.train.product import left_over
from tests.train.test_run import numbers

WORKER = Path(__file__).with_name("lives.py")
DP = ["parallel.tp=1", "train.steps=12", "eval.interval=6", "checkpoint.interval=3"]
IMPATIENT = [*DP, "watchdog.min_step_s=4"]  # more than what makes a rank silent


@pytest.fixture(scope="module")
def lives(small: Small, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lives")
    run = small.overrides(folder / "run")
    (folder / "lives.json").write_text(
        json.dumps(
            {
                "gil": {"overrides": run + IMPATIENT, "fault": "gil", "step": 5, "ranks": [1]},
                "read": {
                    "overrides": run + IMPATIENT,
                    "fault": "read",
                    "phase": "data",
                    "step": 5,  # of this life, which begins after step 3
                    "ranks": [0],
                },
                "rest": {"overrides": run + DP},
                "whole": {"overrides": small.overrides(folder / "whole") + DP},
            }
        )
    )
    run_worker(WORKER, folder, folder / "lives.json")
    return folder


def life(lives: Path, name: str) -> dict:
    return json.loads((lives / f"{name}.json").read_text())


def stall(lives: Path, step: int) -> Path:
    return lives / f"run/stalls/{step:08d}"


@pytest.mark.parametrize("name", ["gil", "read"])
def test_it_ends_with_75_on_every_rank(lives: Path, name: str) -> None:
    assert life(lives, name)["codes"] == [75, 75]


@pytest.mark.parametrize(("name", "step", "rank"), [("gil", 5, 1), ("read", 8, 0)])
def test_the_rank_that_the_others_wait_for_is_named(lives: Path, name: str, step: int, rank: int) -> None:
    said = life(lives, name)["output"]
    assert said.count("stalled in ") == 1
    assert f"stalled in train of step {step}: " in said
    assert said.count("behind: ") == 1
    assert f"behind: rank {rank} on " in said
    assert "Traceback" not in said
    assert (stall(lives, step) / "summary.txt").read_text().strip() in said


def test_the_stacks_of_both_ranks_show_where_they_were(lives: Path) -> None:
    stacks = [(stall(lives, 5) / f"rank-0000{rank}.txt").read_text() for rank in range(2)]
    assert "all_reduce" in stacks[0]
    assert "keep_the_interpreter" in stacks[1]
    stacks = [(stall(lives, 8) / f"rank-0000{rank}.txt").read_text() for rank in range(2)]
    assert "read_what_never_comes" in stacks[0]
    assert "all_reduce" in stacks[1]


def test_it_goes_on_from_the_newest_checkpoint(lives: Path) -> None:
    assert "resuming at step 3 from" in life(lives, "read")["output"]
    assert "resuming at step 6 from" in life(lives, "rest")["output"]


def test_it_ends_as_an_undisturbed_run(lives: Path) -> None:
    assert life(lives, "rest")["codes"] == [0, 0]
    assert life(lives, "whole")["codes"] == [0, 0]
    assert len(numbers(lives / "run")) == 12
    assert numbers(lives / "run") == numbers(lives / "whole")


def test_no_process_is_left(lives: Path) -> None:
    assert left_over(lives / "run") == []
