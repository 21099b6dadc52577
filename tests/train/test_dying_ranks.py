"""One rank that dies or is stopped ends the whole job, under the launcher that jobs are started with."""

import json
import re
import signal
from functools import partial
from pathlib import Path

import psutil
import pytest

from llama_mcore.observe.goodput.attempts import read_ended_attempts
from tests.support.models import Small
from tests.support.product import Finished, finish, left_over, metrics, start
from tests.train.attempts import Attempt, ask, live, wait_for_steps

pytestmark = pytest.mark.process

SETTINGS = [
    "parallel.tp=1",
    "train.steps=400",
    "data.epochs=20",
    "eval.interval=0",
    "checkpoint.interval=1000",
]
IMPATIENT = ["watchdog.min_step_s=8"]
STEPS = 5
"""Enough to know how long a step takes."""
Ended = tuple[Path, Finished]


def signal_rank_1(overrides: list[str], run_dir: Path, number: signal.Signals) -> Finished:
    """Train on two ranks; after some steps the process of rank 1 that trains gets a signal."""
    launcher = start(overrides, ranks=2)
    wait_for_steps(run_dir, STEPS, lambda: launcher.poll() is None)
    # launcher, supervisor, training process: each the child of the one before
    for supervisor in psutil.Process(launcher.pid).children():
        if supervisor.environ()["RANK"] == "1":
            supervisor.children()[0].send_signal(number)
    return finish(launcher)


@pytest.fixture(scope="module")
def killed(small: Small, tmp_path_factory: pytest.TempPathFactory) -> Ended:
    run_dir = tmp_path_factory.mktemp("killed")
    return run_dir, signal_rank_1([*small.overrides(run_dir), *SETTINGS], run_dir, signal.SIGKILL)


@pytest.fixture(scope="module")
def stopped(small: Small, tmp_path_factory: pytest.TempPathFactory) -> Ended:
    run_dir = tmp_path_factory.mktemp("stopped")
    overrides = [*small.overrides(run_dir), *SETTINGS, *IMPATIENT]
    return run_dir, signal_rank_1(overrides, run_dir, signal.SIGSTOP)


def test_a_rank_that_is_killed_ends_the_job(killed: Ended) -> None:
    run_dir, found = killed
    assert found.exit_code in (1, 137), found.output  # which of the two ends first is chance
    assert "killed by SIGKILL" in found.output
    # Rank 0 ended in time: torchrun kills what goes on, which then writes down no end.
    (attempt,) = read_ended_attempts(run_dir)
    assert attempt.exit_code in (1, 128 + signal.SIGTERM)
    assert left_over(run_dir) == []


def test_a_rank_that_is_stopped_ends_the_job_to_be_started_again(stopped: Ended) -> None:
    run_dir, found = stopped
    (summary,) = run_dir.glob("stalls/*/summary.txt")
    said = summary.read_text().strip()
    assert found.exit_code == 75, found.output
    assert found.output.count(said) == 1
    assert re.findall(r"rank (\d+) on ", said) == ["1"]
    assert "Traceback" not in found.output
    assert left_over(run_dir) == []


def test_both_ranks_leave_what_they_know(stopped: Ended) -> None:
    (folder,) = (stopped[0] / "stalls").iterdir()
    assert "llama_mcore/train/trainer.py" in (folder / "rank-00000.txt").read_text()
    assert "stopped" in (folder / "rank-00001.txt").read_text()
    reports = [json.loads((folder / f"rank-0000{rank}.json").read_text()) for rank in range(2)]
    assert [report["state"] == "stopped" for report in reports] == [False, True]


def test_the_same_command_begins_again(small: Small, stopped: Ended) -> None:
    """There was no checkpoint yet: what the stall left in the folder must not stand in the way."""
    overrides = [*small.overrides(stopped[0]), *SETTINGS, *IMPATIENT]
    again = live(Attempt(overrides, partial(ask, signal.SIGTERM), step=3, ranks=[0, 1]))
    assert again.codes == [75, 75], again.output
    assert [row["step"] for row in metrics(stopped[0])] == [1, 2, 3]
