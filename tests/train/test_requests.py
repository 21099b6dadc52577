"""A request to stop in every phase of a run, to one rank and to all: one save or none, exit code 75, and the
same numbers in the end."""

import json
import re
from pathlib import Path

import pytest

from tests.conftest import Small
from tests.forked import run_worker
from tests.train.product import checkpoints, left_over, metrics
from tests.train.test_run import numbers

WORKER = Path(__file__).with_name("lives.py")
SETTINGS = ["parallel.tp=1", "train.steps=6", "eval.interval=4", "checkpoint.interval=3"]
# Phase in which the request comes -> the step that begins, and the one that the last checkpoint is of.
NOTHING_TRAINED = {"before": 0, "start": 0, "setup": 0}
SAVED = {"train": (2, 2), "evaluate": (4, 4), "save": (3, 3)}
LIVES = [*NOTHING_TRAINED, *SAVED]


@pytest.fixture(scope="module")
def lives(small: Small, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each phase with USR1 to rank 1, then with TERM to both; `save` and `evaluate` go on afterwards."""
    folder = tmp_path_factory.mktemp("requests")
    todo = {"whole": {"overrides": small.overrides(folder / "whole") + SETTINGS}}
    for fault, ranks in (("USR1", [1]), ("TERM", [0, 1])):
        for phase in LIVES:
            step = SAVED[phase][0] if phase in SAVED else 0
            name = f"{phase}-{fault}"
            overrides = small.overrides(folder / f"run-{name}") + SETTINGS
            where = {"fault": fault, "phase": phase, "step": step, "ranks": ranks}
            todo[name] = {"overrides": overrides, **where}
    for name in ("evaluate-USR1", "save-TERM"):
        todo[f"{name}-rest"] = {"overrides": todo[name]["overrides"]}
    end = {"overrides": small.overrides(folder / "run-end") + SETTINGS, "fault": "TERM", "phase": "end"}
    todo["end"] = {**end, "step": 6, "ranks": [1]}
    todo["never"] = {
        "overrides": small.overrides(folder / "run-never") + SETTINGS,
        "fault": "never-come",
        "started": 1,
    }
    (folder / "lives.json").write_text(json.dumps(todo))
    run_worker(WORKER, folder, folder / "lives.json")
    return folder


def life(lives: Path, name: str) -> dict:
    return json.loads((lives / f"{name}.json").read_text())


@pytest.mark.parametrize("fault", ["USR1", "TERM"])
@pytest.mark.parametrize("phase", LIVES)
def test_it_ends_with_75(lives: Path, phase: str, fault: str) -> None:
    found = life(lives, f"{phase}-{fault}")
    assert found["codes"] == [75, 75], found["output"]
    assert "Traceback" not in found["output"]
    assert left_over(lives / f"run-{phase}-{fault}") == []


@pytest.mark.parametrize("fault", ["USR1", "TERM"])
@pytest.mark.parametrize("phase", SAVED)
def test_what_was_trained_is_saved_once(lives: Path, phase: str, fault: str) -> None:
    last, said = SAVED[phase][1], life(lives, f"{phase}-{fault}")["output"]
    expected = sorted({*range(3, last + 1, 3), last})
    assert re.findall(r"INFO saved .*/step-0*(\d+) in", said) == [str(step) for step in expected]
    assert f"stopped at step {last} of 6" in said


@pytest.mark.parametrize("fault", ["USR1", "TERM"])
@pytest.mark.parametrize("phase", NOTHING_TRAINED)
def test_before_the_first_step_nothing_is_saved(lives: Path, phase: str, fault: str) -> None:
    run_dir = lives / f"run-{phase}-{fault}"
    assert not list(run_dir.glob("checkpoints/*"))
    assert metrics(run_dir) == []


@pytest.mark.parametrize("fault", ["USR1", "TERM"])
def test_what_is_made_ready_is_not_waited_for(lives: Path, fault: str) -> None:
    output = life(lives, f"setup-{fault}")["output"]
    assert "stopped before the first step; the same command starts again" in output
    assert "parameters on 2 ranks" not in output


def test_waiting_for_ranks_that_never_come_ends(lives: Path) -> None:
    assert life(lives, "never")["codes"] == [75]


def test_a_request_after_the_last_step_changes_nothing(lives: Path) -> None:
    assert life(lives, "end")["codes"] == [0, 0]
    assert checkpoints(lives / "run-end") == checkpoints(lives / "whole")


def test_a_run_goes_on_as_if_nothing_had_been(lives: Path) -> None:
    assert life(lives, "save-TERM-rest")["codes"] == [0, 0]
    assert numbers(lives / "run-save-TERM") == numbers(lives / "whole")


def test_an_evaluation_that_was_stopped_is_recorded_and_all_else_is_the_same(lives: Path) -> None:
    assert life(lives, "evaluate-USR1-rest")["codes"] == [0, 0]
    found, whole = (metrics(lives / name) for name in ("run-evaluate-USR1", "whole"))
    assert [row["step"] for row in found if row.get("evaluation_stopped")] == [4]
    assert [row["step"] for row in found if "valid" in row] == [6]
    assert [row["step"] for row in whole if "valid" in row] == [4, 6]
    for name in ("loss", "grad_norm", "lr", "tokens"):
        assert [row[name] for row in found] == [row[name] for row in whole]
    assert found[-1]["valid"] == whole[-1]["valid"]
