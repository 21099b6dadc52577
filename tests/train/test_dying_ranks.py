"""One rank that dies or is stopped ends the whole job, under the launcher that jobs are started with."""

import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.conftest import Small
from tests.train.product import LLAMA_MCORE, Finished, left_over, metrics, stop_after_a_step, train

SETTINGS = [
    "parallel.tp=1",
    "train.steps=400",
    "data.epochs=20",
    "eval.interval=0",
    "checkpoint.interval=1000",
]
FEW_STEPS = ["train.steps=60"]
IMPATIENT = ["watchdog.min_step_s=6", "watchdog.first_step_s=9"]


def to_the_training_process_of_rank_1(number: signal.Signals) -> Callable[[psutil.Process], None]:
    """Launcher, supervisor, training process: each the child of the one before."""

    def send(launcher: psutil.Process) -> None:
        (supervisor,) = [child for child in launcher.children() if child.environ()["RANK"] == "1"]
        supervisor.children()[0].send_signal(number)

    return send


@pytest.fixture(scope="module")
def killed(small: Small, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Finished, float]:
    """Its folder, what came of it, and the seconds from the fault to the end."""
    run_dir = tmp_path_factory.mktemp("killed")
    since = []
    send = to_the_training_process_of_rank_1(signal.SIGKILL)

    def stop(launcher: psutil.Process) -> None:
        since.append(time.monotonic())
        send(launcher)

    found = stop_after_a_step(small.overrides(run_dir) + SETTINGS, run_dir, stop, LLAMA_MCORE)
    return run_dir, found, time.monotonic() - since[0]


@pytest.fixture(scope="module")
def stopped(small: Small, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Finished]:
    run_dir = tmp_path_factory.mktemp("stopped")
    overrides = small.overrides(run_dir) + SETTINGS + FEW_STEPS + IMPATIENT
    send = to_the_training_process_of_rank_1(signal.SIGSTOP)
    return run_dir, stop_after_a_step(overrides, run_dir, send, LLAMA_MCORE)


def test_a_rank_that_is_killed_ends_the_job(killed: tuple[Path, Finished, float]) -> None:
    run_dir, found, seconds = killed
    output = "\n".join(found.lines)
    assert found.exit_code in (1, 137), output  # which of the two ends first is chance
    assert "the training process was killed by SIGKILL in train of step " in output
    assert seconds < 30
    assert left_over(run_dir) == []


def test_a_rank_that_is_stopped_ends_the_job_to_be_started_again(stopped: tuple[Path, Finished]) -> None:
    run_dir, found = stopped
    output = "\n".join(found.lines)
    assert found.exit_code == 75, output
    assert output.count("behind: rank 1 on ") == 1
    assert "(stopped for " in output
    assert "Traceback" not in output
    assert left_over(run_dir) == []


def test_both_ranks_leave_what_they_know(stopped: tuple[Path, Finished]) -> None:
    (folder,) = (stopped[0] / "stalls").iterdir()
    assert "llama_mcore/train/loop.py" in (folder / "rank-00000.txt").read_text()
    assert "does not answer: it is stopped" in (folder / "rank-00001.txt").read_text()
    assert {path.name for path in folder.glob("*.json")} == {"rank-00000.json", "rank-00001.json"}


def test_the_same_command_begins_again(small: Small, stopped: tuple[Path, Finished]) -> None:
    """There was no checkpoint yet: what the stall left in the folder must not stand in the way."""
    resumed = train(small.overrides(stopped[0]) + SETTINGS + FEW_STEPS + IMPATIENT, ranks=2)
    assert resumed.exit_code == 0, "\n".join(resumed.lines)
    assert len(metrics(stopped[0])) == 60
