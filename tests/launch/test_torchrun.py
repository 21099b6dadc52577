"""llama_mcore.launch.torchrun: exit codes and signals pass through a real torchrun."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import ROOT
from tests.forked import run_worker

WORKER = Path(__file__).with_name("launches.py")


@pytest.fixture(scope="module")
def launches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("launches")
    run_worker(WORKER, folder)
    return folder


def exit_code(launches: Path, name: str) -> Any:
    return json.loads((launches / "exit_codes.json").read_text())[name]


@pytest.mark.parametrize(
    ("of_worker", "of_job"), [(0, 0), (75, 75), (64, 64), (73, 73), (3, 3), (-9, 137), (-11, 139)]
)
def test_the_exit_code_of_a_worker_becomes_that_of_the_job(
    launches: Path, of_worker: int, of_job: int
) -> None:
    assert exit_code(launches, f"exit{of_worker}") == of_job


def test_numbers_that_are_none_are_refused_without_a_traceback() -> None:
    words = ["torchrun", "--nproc-per-node", "0", "--nnodes", "abc", "tools/train.py"]
    command = [sys.executable, "-m", "llama_mcore.cli", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 64
    assert "--nproc-per-node = 0" in done.stderr
    assert "--nnodes = abc" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("code", [0, 75, 64, 73])
def test_nothing_is_added_to_what_a_worker_has_explained(launches: Path, code: int) -> None:
    assert (launches / f"exit{code}.txt").read_text() == ""


@pytest.mark.parametrize("code", [3, -9, -11])
def test_an_unexplained_end_is_one_line(launches: Path, code: int) -> None:
    assert (launches / f"exit{code}.txt").read_text() == f"rank 1 failed with exit code {code}\n"


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_a_signal_reaches_every_worker(launches: Path, name: str) -> None:
    arrives = "SIGUSR1" if name == "SIGTERM" else name  # torchrun's own TERM says that another worker ended
    assert [(launches / name / f"got-{rank}").read_text() for rank in range(2)] == [arrives] * 2
    assert exit_code(launches, name) == 75


def test_signals_wait_until_a_worker_is_ready_for_them(launches: Path) -> None:
    held = [set((launches / f"held-{rank}").read_text().split()) for rank in range(2)]
    assert all({"SIGTERM", "SIGUSR1", "SIGINT"} <= names for names in held)


def test_a_node_that_waits_for_another_can_be_stopped(launches: Path) -> None:
    assert exit_code(launches, "alone") == 75


def test_a_rank_that_fails_ends_the_other_node_with_the_same_exit_code(launches: Path) -> None:
    """Its rank waits for ever, as one does in a collective of NCCL."""
    assert exit_code(launches, "failed") == [3, 3]
    assert (launches / "told").read_text() == "SIGTERM"
    assert (launches / "failed-node-0.txt").read_text() == ""
    assert (launches / "failed-node-1.txt").read_text() == "rank 1 failed with exit code 3\n"


def test_nodes_that_never_come_are_no_traceback(launches: Path) -> None:
    assert exit_code(launches, "missing") == 69
    said = (launches / "missing.txt").read_text()
    assert said.startswith("preflight error: --nnodes = 2: not all came (")
    assert "Traceback" not in said


def test_a_second_request_ends_workers_that_hear_none(launches: Path) -> None:
    assert exit_code(launches, "deaf") == 137


def test_workers_share_the_cores(launches: Path) -> None:
    share = str(max(1, len(os.sched_getaffinity(0)) // 2))
    assert [(launches / f"threads-{rank}").read_text() for rank in range(2)] == [share] * 2


def test_under_srun_ranks_follow_the_nodes_also_where_their_port_is_taken(launches: Path) -> None:
    assert [(launches / f"node-{number}.txt").read_text() for number in range(2)] == ["", ""]
    assert exit_code(launches, "nodes") == 0
    places = [(launches / f"place-{rank}").read_text().split() for rank in range(4)]
    assert [place[:3] for place in places] == [["4", str(rank % 2), str(rank // 2)] for rank in range(4)]
    assert len({tuple(place[3:]) for place in places}) == 1
