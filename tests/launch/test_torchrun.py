"""llama_mcore.launch.torchrun: exit codes and signals pass through a real torchrun.

Launchers are forked; their workers are real processes of job.py.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from struct import Struct

import psutil
import pytest

from llama_mcore.distributed.launch_env import OUR_TORCHRUN
from llama_mcore.launch import torchrun
from llama_mcore.watchdog import liveness
from tests.support.errors import is_shown
from tests.support.product import Finished, Job, launched_environment, llama_mcore, run_command
from tests.support.world import (
    ROOT,
    TIMEOUT_S,
    Call,
    exit_codes_of,
    reserved_port,
    wait_until,
    write_output_to,
)

pytestmark = pytest.mark.process
JOB = Path(__file__).with_name("job.py")
ON_TWO_RANKS = ("torchrun", "--nproc-per-node", "2", JOB)


@pytest.fixture(scope="module")
def exits() -> dict[int, Finished]:
    """Exit code of worker 1 -> how the launcher ended."""
    return {code: llama_mcore(*ON_TWO_RANKS, "exit", code) for code in (0, 75, 64, 73, 3, -9, -11)}


@pytest.mark.parametrize(
    ("of_worker", "of_job"), [(0, 0), (75, 75), (64, 64), (73, 73), (3, 3), (-9, 137), (-11, 139)]
)
def test_the_exit_code_of_a_worker_becomes_that_of_the_job(
    exits: dict[int, Finished], of_worker: int, of_job: int
) -> None:
    assert exits[of_worker].exit_code == of_job


def test_numbers_that_are_none_are_refused_without_a_traceback() -> None:
    done = llama_mcore("torchrun", "--nproc-per-node", "0", "--nnodes", "abc", "tools/train.py")
    assert done.exit_code == 64
    assert is_shown(done.output, "--nproc-per-node", 0)
    assert is_shown(done.output, "--nnodes", "abc")
    assert "Traceback" not in done.output


@pytest.mark.parametrize("code", [0, 75, 64, 73])
def test_nothing_is_added_to_what_a_worker_has_explained(exits: dict[int, Finished], code: int) -> None:
    assert exits[code].output == ""


@pytest.mark.parametrize("code", [3, -9, -11])
def test_an_unexplained_end_is_one_line(exits: dict[int, Finished], code: int) -> None:
    (line,) = exits[code].lines
    assert "rank 1" in line
    assert str(code) in line


def test_nothing_stays_in_the_temporary_folder(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "llama_mcore.cli", *map(str, ON_TWO_RANKS), "exit", "0"]
    environment = launched_environment() | {"TMPDIR": str(tmp_path)}
    assert subprocess.run(command, cwd=ROOT, env=environment, timeout=TIMEOUT_S).returncode == 0
    assert list(tmp_path.iterdir()) == []
    assert torchrun.parsed(["--redirects", "3", "train.py"]).log_dir is None  # a folder of torchrun's choice


def wait_for_workers(folder: Path, job: Job | Call) -> None:
    wait_until(lambda: len(list(folder.glob("ready-*"))) == 2, job.is_alive)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_a_signal_reaches_every_worker(tmp_path: Path, name: str) -> None:
    job = Job((*ON_TWO_RANKS, "signal", tmp_path), 1)
    wait_for_workers(tmp_path, job)
    (launcher,) = job.ranks()
    launcher.send_signal(signal.Signals[name])
    assert job.finish().exit_code == 75
    arrives = "SIGUSR1" if name == "SIGTERM" else name  # torchrun's own TERM says that another worker ended
    assert [(tmp_path / f"got-{rank}").read_text() for rank in range(2)] == [arrives] * 2


def test_signals_wait_until_a_worker_is_ready_for_them(tmp_path: Path) -> None:
    assert llama_mcore(*ON_TWO_RANKS, "held", tmp_path).exit_code == 0
    held = [set((tmp_path / f"held-{rank}").read_text().split()) for rank in range(2)]
    assert all({"SIGTERM", "SIGUSR1", "SIGINT"} <= names for names in held)


def test_a_node_that_waits_for_another_can_be_stopped() -> None:
    with reserved_port() as port:
        where = ("--master-addr", "localhost", "--master-port", port)
        job = Job(("torchrun", "--nnodes", "2", *where, JOB, "exit", "0"), 1)
        wait_until(lambda: listens(port), job.is_alive)
        (launcher,) = job.ranks()
        launcher.terminate()
        assert job.finish().exit_code == 75


def listens(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("localhost", port)):
        return True
    return False


def on_two_nodes(folder: Path, ranks_a_node: int, what: str) -> list[int]:
    """Exit codes of a launcher on each, as slurm/run.sh has them started, with a port that is taken."""
    with socket.create_server(("localhost", 0)) as taken:  # by another program, which says nothing
        return exit_codes_of(2, on_node, folder, taken.getsockname()[1], ranks_a_node, what)


def on_node(folder: Path, port: int, ranks: int, what: str) -> None:
    os.environ["SLURM_NODEID"] = node = os.environ["RANK"]
    write_output_to(folder / f"node-{node}.txt")
    where = ["--master-addr", "localhost", "--master-port", str(port), "--rdzv-id", "7"]
    nodes = ["--nnodes", "2", "--nproc-per-node", str(ranks)]
    run_command(["torchrun", *nodes, *where, str(JOB), what, str(folder)])


def test_a_rank_that_fails_ends_the_other_node_with_the_same_exit_code(tmp_path: Path) -> None:
    """The rank there waits for ever, as one does in a collective of NCCL."""
    assert on_two_nodes(tmp_path, 1, "fails") == [3, 3]
    assert (tmp_path / "told").read_text() == "SIGTERM"
    assert (tmp_path / "node-0.txt").read_text() == ""
    (line,) = (tmp_path / "node-1.txt").read_text().splitlines()
    assert "rank 1" in line


def test_nodes_that_never_come_are_no_traceback() -> None:
    with reserved_port() as port:
        job = Call(exit_codes_of, 1, wait_for_another_node, port)
        assert job.result() == [69]
    assert is_shown(job.output, "--nnodes", 2)
    assert "Traceback" not in job.output


def wait_for_another_node(port: int) -> None:
    torchrun.LIMIT_S = 2.0
    where = ["--master-addr", "localhost", "--master-port", str(port)]
    run_command(["torchrun", "--nnodes", "2", *where, str(JOB), "exit", "0"])


def supervised(folder: Path) -> None:
    """A launcher that is impatient with supervisors."""
    liveness.SILENT_S = 3.0
    write_output_to(folder / "output.txt")
    run_command(["torchrun", "--nproc-per-node", "2", str(JOB), "watched", str(folder)])


def test_liveness_of_a_supervisor_that_is_stopped_ends_the_run(tmp_path: Path) -> None:
    job = Call(exit_codes_of, 1, supervised, tmp_path)
    wait_for_workers(tmp_path, job)
    pid = int((tmp_path / "supervisor-1").read_text())
    time.sleep(2 * liveness.ALIVE_S)  # it has reported before
    os.kill(pid, signal.SIGSTOP)
    assert job.result() == [75]
    (line,) = (tmp_path / "output.txt").read_text().splitlines()
    assert f"local rank 1 (process {pid})" in line
    trains = int((tmp_path / "trains-1").read_text())
    wait_until(lambda: not psutil.pid_exists(trains))


def test_liveness_records_leave_no_file() -> None:
    with liveness.LivenessMonitor():
        path = os.environ[OUR_TORCHRUN]
        liveness.report_alive(os.environ)
        wait_until(lambda: Path(path).read_bytes() != b"")
        pid, shown = Struct("<qd").unpack(Path(path).read_bytes())
    assert pid == os.getpid()
    assert 0 <= time.monotonic() - shown < 60
    assert "memfd" in os.readlink(path)  # it has no name


def test_a_second_request_ends_workers_that_hear_none(tmp_path: Path) -> None:
    job = Call(exit_codes_of, 1, launch_impatiently, tmp_path)
    wait_for_workers(tmp_path, job)
    while job.is_alive():
        for launcher in psutil.Process(job.pid).children():
            launcher.terminate()
        time.sleep(0.1)
    assert job.result() == [137]


def launch_impatiently(folder: Path) -> None:
    torchrun.ECHO_S, liveness.WORKERS_END_S = 0.0, 1.0
    run_command([*map(str, ON_TWO_RANKS), "deaf", str(folder)])


def test_workers_share_the_cores(tmp_path: Path) -> None:
    assert exit_codes_of(1, launch_without_a_number_of_threads, tmp_path) == [0]
    share = str(max(1, len(os.sched_getaffinity(0)) // 2))
    assert [(tmp_path / f"threads-{rank}").read_text() for rank in range(2)] == [share] * 2


def launch_without_a_number_of_threads(folder: Path) -> None:
    del os.environ["OMP_NUM_THREADS"]
    run_command([*map(str, ON_TWO_RANKS), "threads", str(folder)])


def test_under_srun_ranks_follow_the_nodes_also_where_their_port_is_taken(tmp_path: Path) -> None:
    assert on_two_nodes(tmp_path, 2, "place") == [0, 0]
    assert [(tmp_path / f"node-{number}.txt").read_text() for number in range(2)] == ["", ""]
    places = [(tmp_path / f"place-{rank}").read_text().split() for rank in range(4)]
    assert [place[:3] for place in places] == [["4", str(rank % 2), str(rank // 2)] for rank in range(4)]
    assert len({tuple(place[3:]) for place in places}) == 1
