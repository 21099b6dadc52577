"""llama_mcore.watchdog.supervisor: exit codes, requests and stalls, with real processes that need no
torch."""

import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from llama_mcore.distributed.launch_env import OUR_TORCHRUN
from llama_mcore.observe.goodput.attempts import read_ended_attempts, read_noted_attempts
from tests.support.product import launched_environment
from tests.support.world import TIMEOUT_S, wait_until

pytestmark = [pytest.mark.process, pytest.mark.wait]
WORKER = Path(__file__).with_name("supervised.py")
DIES_S = 60.0
"""In which what the kernel kills is gone, on a machine however slow."""
UNDER_TORCHRUN = {"TORCHELASTIC_RESTART_COUNT": "0"}


def start(what: str, run_dir: Path, **variables: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(WORKER), what, str(run_dir)],
        env=launched_environment() | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ready(job: subprocess.Popen[str]) -> int:
    """Process id of the one that would train, once it is at work."""
    assert job.stdout
    return int(job.stdout.readline().split()[1])


def finish(job: subprocess.Popen[str]) -> tuple[int, str]:
    try:
        _, said = job.communicate(timeout=TIMEOUT_S)
    finally:
        job.kill()
    return job.returncode, said


@pytest.mark.parametrize("code", [0, 1, 64, 75])
def test_the_exit_code_is_that_of_the_process(tmp_path: Path, code: int) -> None:
    assert finish(start(f"exit{code}", tmp_path)) == (code, "")


def test_leaving_early_with_0_is_a_failure(tmp_path: Path) -> None:
    code, said = finish(start("leaves", tmp_path))
    assert code == 70
    assert "exit code 0 in train of step 7" in said


def test_an_exception_is_1(tmp_path: Path) -> None:
    code, said = finish(start("raises", tmp_path))
    assert code == 1
    assert "a fault of the test" in said


def test_a_signal_that_nobody_asked_for_is_named(tmp_path: Path) -> None:
    code, said = finish(start("killed", tmp_path))
    assert code == 128 + 9
    assert "killed by SIGKILL in train of step 7" in said


def test_it_is_named_after_a_request_too(tmp_path: Path) -> None:
    """Memory may run out in the save after a request."""
    job = start("killed-saving", tmp_path)
    ready(job)
    job.send_signal(signal.SIGUSR1)
    code, said = finish(job)
    assert code == 128 + 9
    assert "killed by SIGKILL in train of step 7" in said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_request_reaches_the_process(tmp_path: Path, number: signal.Signals) -> None:
    job = start("obeys", tmp_path)
    ready(job)
    job.send_signal(number)
    assert finish(job) == (75, "")


def test_a_request_before_the_fork_is_not_lost(tmp_path: Path) -> None:
    code, said = finish(start("early", tmp_path))
    assert code == 75
    assert "asked to stop" in said


def test_a_request_ends_the_wait_for_others(tmp_path: Path) -> None:
    job = start("waits", tmp_path)
    pid = ready(job)
    job.send_signal(signal.SIGTERM)
    assert finish(job)[0] == 75
    assert not psutil.pid_exists(pid)


def test_a_request_in_the_set_up_is_not_waited_for_long(tmp_path: Path) -> None:
    job = start("sets-up", tmp_path)
    pid = ready(job)
    job.send_signal(signal.SIGTERM)
    assert finish(job) == (75, "")
    assert not psutil.pid_exists(pid)


@pytest.mark.parametrize(("what", "code"), [("killed", 128 + 9), ("hangs", 75)])
def test_an_output_that_cannot_be_written_changes_no_exit_code(tmp_path: Path, what: str, code: int) -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, str(WORKER), what, str(tmp_path)]
        done = subprocess.run(command, env=launched_environment(), stderr=full, timeout=TIMEOUT_S)
    assert done.returncode == code


def test_a_second_request_ends_a_process_that_is_stuck(tmp_path: Path) -> None:
    job = start("stuck", tmp_path)
    pid = ready(job)
    job.send_signal(signal.SIGUSR1)
    job.send_signal(signal.SIGTERM)
    assert finish(job) == (128 + 15, "")  # by the second one
    assert not psutil.pid_exists(pid)


def test_what_comes_soon_after_a_request_is_no_second_one(tmp_path: Path) -> None:
    job = start("obeys-slowly", tmp_path)
    ready(job)
    job.send_signal(signal.SIGUSR1)
    job.send_signal(signal.SIGTERM)
    assert finish(job) == (75, "")


def test_the_process_dies_with_its_supervisor(tmp_path: Path) -> None:
    job = start("waits", tmp_path)
    process = psutil.Process(ready(job))
    job.kill()
    job.wait()
    assert psutil.wait_procs([process], timeout=DIES_S)[1] == []


def test_a_rank_dies_with_torchrun(tmp_path: Path) -> None:
    """A shell in its place, which leaves the supervisor to others."""
    launcher = subprocess.Popen(
        ["bash", "-c", '"$@" & wait', "bash", sys.executable, str(WORKER), "waits", str(tmp_path)],
        env=launched_environment() | UNDER_TORCHRUN,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    process = psutil.Process(ready(launcher))
    ranks = [process, process.parent()]
    launcher.kill()
    assert psutil.wait_procs(ranks, timeout=DIES_S)[1] == []
    assert "torchrun" in launcher.communicate()[1]


@pytest.mark.parametrize(
    ("what", "says", "frame"),
    [
        ("hangs", ["behind: no rank"], "supervised.py"),
        ("gil", ["behind: rank 0 on ", "(running"], "supervised.py"),
        ("stopped", ["behind: rank 0 on ", "(stopped"], "stopped"),
    ],
)
def test_a_stall_is_explained_and_ended(tmp_path: Path, what: str, says: list[str], frame: str) -> None:
    job = start(what, tmp_path)
    pid = ready(job)
    code, said = finish(job)
    assert code == 75
    assert [part for part in ["stalled in train of step 7", *says] if part not in said] == [], said
    assert frame in (tmp_path / "stalls/00000007/rank-00000.txt").read_text()
    assert not psutil.pid_exists(pid)


def test_a_stall_while_starting_leaves_its_stacks_too(tmp_path: Path) -> None:
    code, said = finish(start("never-ready", tmp_path / "run"))
    assert code == 75
    assert "stalled in start of step 0" in said
    assert "supervised.py" in (tmp_path / "run/stalls/00000000/rank-00000.txt").read_text()


def test_a_stall_ends_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "stalls").touch()
    code, said = finish(start("hangs", tmp_path))
    assert code == 75
    assert "stalled in train of step 7" in said


def test_a_process_that_does_not_end_is_not_waited_for(tmp_path: Path) -> None:
    job = start("unkillable", tmp_path)
    process = psutil.Process(ready(job))
    code, said = finish(job)
    assert code == 75
    assert "SIGKILL" in said
    assert psutil.wait_procs([process], timeout=DIES_S)[1] == []


def test_a_job_that_was_suspended_has_not_stalled(tmp_path: Path) -> None:
    job = start("suspended", tmp_path)
    process = psutil.Process(ready(job))
    job.send_signal(signal.SIGSTOP)
    process.suspend()
    time.sleep(4)  # longer than a step may take
    job.send_signal(signal.SIGCONT)
    time.sleep(1)  # in which it looks, and sees no newer sign of life
    process.resume()
    time.sleep(1)  # in which it looks again
    job.send_signal(signal.SIGTERM)
    assert finish(job) == (0, "")


def test_the_watchdog_can_be_switched_off(tmp_path: Path) -> None:
    assert finish(start("slow-but-off", tmp_path)) == (0, "")


def ends(run_dir: Path) -> list[tuple[int, bool, bool, int]]:
    """Exit codes in attempts.jsonl of each attempt."""
    return [
        (attempt.exit_code, attempt.asked, attempt.saved, attempt.step)
        for attempt in read_ended_attempts(run_dir)
    ]


def test_an_attempt_is_written_down_with_what_came_of_it(tmp_path: Path) -> None:
    before = time.time()
    finish(start("killed", tmp_path / "not/there", SLURM_JOB_ID="4711"))
    (attempt,) = read_ended_attempts(tmp_path / "not/there")
    assert (attempt.exit_code, attempt.asked, attempt.saved, attempt.step) == (137, False, False, 7)
    assert (attempt.job, attempt.host, attempt.ranks) == ("4711", socket.gethostname(), 1)
    tick = 0.02  # the kernel's clock of process starts has steps of 0.01 s
    assert before - tick < attempt.began < attempt.ended < time.time() + tick


def test_an_attempt_that_was_asked_to_stop_says_so(tmp_path: Path) -> None:
    job = start("obeys", tmp_path)
    ready(job)
    job.send_signal(signal.SIGTERM)
    finish(job)
    assert ends(tmp_path) == [(75, True, False, 7)]


def test_a_stall_after_a_request_is_a_stall(tmp_path: Path) -> None:
    job = start("gil", tmp_path)
    ready(job)
    job.send_signal(signal.SIGTERM)
    assert finish(job)[0] == 75
    assert ends(tmp_path) == [(75, False, False, 7)]


def test_an_attempt_that_nobody_saw_end_was_written_down_too(tmp_path: Path) -> None:
    job = start("dies-with-all", tmp_path, SLURM_JOB_ID="4711")
    ready(job)
    wait_until(lambda: read_noted_attempts(tmp_path))
    job.kill()
    job.wait()
    (attempt,) = read_noted_attempts(tmp_path)
    assert (attempt.job, attempt.saved) == ("4711", False)
    assert read_ended_attempts(tmp_path) == []


def test_only_rank_0_writes(tmp_path: Path) -> None:
    place = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}
    assert finish(start("killed", tmp_path, MASTER_PORT="29500", **place))[0] == 137
    assert ends(tmp_path) == []


def test_an_error_of_the_users_marks_no_folder_that_is_not_the_runs(tmp_path: Path) -> None:
    assert finish(start("exit64", tmp_path))[0] == 64
    assert list(tmp_path.iterdir()) == []
    assert finish(start("settled", tmp_path))[0] == 65
    assert ends(tmp_path) == [(65, False, True, 0)]


@pytest.mark.parametrize("in_the_way", ["file", "dead link"])
def test_what_cannot_be_written_changes_nothing(tmp_path: Path, in_the_way: str) -> None:
    if in_the_way == "file":
        (tmp_path / "run").touch()
    else:
        (tmp_path / "run").symlink_to(tmp_path / "nowhere/at/all")
    assert finish(start("exit75", tmp_path / "run")) == (75, "")


def test_a_file_system_that_hangs_is_not_waited_for(tmp_path: Path) -> None:
    assert finish(start("disk-hangs", tmp_path)) == (0, "")


@pytest.mark.parametrize("launcher", [{}, {OUR_TORCHRUN: "1"}], ids=["plain torchrun", "our torchrun"])
@pytest.mark.parametrize(
    ("what", "code", "step"), [("waits", 75, 0), ("alone", 128 + 15, 7)], ids=["starting", "training"]
)
def test_the_end_of_another_rank_is_no_request(
    tmp_path: Path, what: str, code: int, step: int, launcher: dict[str, str]
) -> None:
    """Torchrun, the parent, then sends TERM; a rank that is stuck is not left to torchrun's SIGKILL."""
    job = start(what, tmp_path, **UNDER_TORCHRUN, **launcher)
    ready(job)
    job.send_signal(signal.SIGTERM)
    assert finish(job) == (code, "")
    assert ends(tmp_path) == [(code, False, False, step)]


def test_under_torchrun_too_others_can_ask(tmp_path: Path) -> None:
    job = start("obeys", tmp_path, **UNDER_TORCHRUN)
    ready(job)
    subprocess.run(["kill", "-TERM", str(job.pid)], check=True)
    assert finish(job) == (75, "")
    assert ends(tmp_path) == [(75, True, False, 7)]
