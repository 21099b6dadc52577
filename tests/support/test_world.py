"""tests.support.world: what a world of ranks promises to the tests that use it."""

import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist

from llama_mcore.distributed.config import ParallelConfig
from llama_mcore.distributed.groups import process_groups
from tests.support.product import llama_mcore
from tests.support.world import Call, call, check_server, exit_codes_of, run_ranks

pytestmark = pytest.mark.process


def total() -> float:
    with process_groups(ParallelConfig(tp=2), seed=0) as groups:
        value = torch.tensor(groups.rank + 1.0)
        dist.all_reduce(value, group=groups.tp_group)
        return value.item()


@pytest.mark.parametrize("spawn", [False, True], ids=["forked", "spawned"])
def test_a_sum_over_two_ranks(spawn: bool) -> None:
    assert run_ranks(2, total, spawn=spawn) == [3.0, 3.0]


def rank_1(what: str) -> int:
    if os.environ["RANK"] == "1":
        if what == "raises":
            raise ValueError("a fault of the test")
        if what == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        wait_for_ever()
    return 0


def wait_for_ever() -> None:
    threading.Event().wait()


@pytest.mark.parametrize(
    ("what", "timeout_s", "fate", "shown"),
    [
        ("raises", 60, "rank 1 ended with exit code 1", "a fault of the test"),
        ("dies", 60, "rank 1 died by SIGKILL", ""),
        ("hangs", 5, "rank 1 hung and was killed", "wait_for_ever"),
    ],
)
def test_a_rank_that_fails_is_named_with_what_it_printed(
    what: str, timeout_s: float, fate: str, shown: str
) -> None:
    with pytest.raises(AssertionError) as failure:
        run_ranks(2, rank_1, what, timeout_s=timeout_s)
    assert fate in str(failure.value)
    assert shown in str(failure.value)


def leave_a_child(group: bool, pid_file: Path) -> None:
    child = os.fork()
    if child == 0:
        if group:
            os.setpgid(0, 0)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        wait_for_ever()
    pid_file.write_text(str(child))


@pytest.mark.parametrize("group", [False, True], ids=["same-group", "own-group"])
def test_nothing_is_left_of_a_world(tmp_path: Path, group: bool) -> None:
    run_ranks(1, leave_a_child, group, tmp_path / "pid")
    pid = int((tmp_path / "pid").read_text())
    until = time.monotonic() + 60
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < until
        time.sleep(0.01)


def test_a_call_that_nobody_waits_for_ends_with_its_test() -> None:
    under_way = Call(wait_for_ever)
    process = psutil.Process(under_way.pid)
    del under_way
    assert psutil.wait_procs([process], timeout=60)[1] == []


def test_ranks_end_with_their_host_where_that_is_killed() -> None:
    """A test run that is killed ends no session itself."""
    host = Call(run_ranks, 2, wait_for_ever)
    process = psutil.Process(host.pid)
    until = time.monotonic() + 60
    while len(ranks := process.children()) < 2:
        assert time.monotonic() < until
        time.sleep(0.01)
    process.kill()
    assert psutil.wait_procs(ranks, timeout=60)[1] == []


def variables() -> tuple[str, ...]:
    return tuple(os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT"))


def test_ranks_have_variables_of_their_own() -> None:
    before = dict(os.environ)
    first, second = run_ranks(2, variables)
    assert (first[:3], second[:3]) == (("0", "0", "2"), ("1", "1", "2"))
    assert first[3] == second[3]
    assert dict(os.environ) == before


def outer_and_inner_port() -> tuple[str, str]:
    ((_, _, _, inner),) = run_ranks(1, variables)
    return os.environ["MASTER_PORT"], inner


def test_worlds_at_the_same_time_have_different_ports() -> None:
    ((outer, inner),) = run_ranks(1, outer_and_inner_port)
    assert outer != inner


def forked_beside_a_thread() -> list[int]:
    threading.Thread(target=wait_for_ever, daemon=True).start()
    return exit_codes_of(1, check_server)


def forked_in_a_process_group() -> list[int]:
    dist.is_initialized = lambda: True
    return exit_codes_of(1, check_server)


def test_no_rank_is_forked_beside_a_thread_or_in_a_group() -> None:
    assert call(forked_beside_a_thread) == [1]
    assert call(forked_in_a_process_group) == [1]


def test_the_products_command_line_runs_in_ranks() -> None:
    done = llama_mcore("train", "--config", "tiny", "model.hidden_size=65", ranks=2)
    assert done.exit_codes == [64, 64]
    assert "model.hidden_size = 65" in done.output


def test_a_test_without_the_mark_may_start_no_process(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.setattr(request.node, "get_closest_marker", lambda name: None)
    with pytest.raises(pytest.fail.Exception, match="mark it `process`"):
        subprocess.run(["true"], check=True)


def test_a_module_is_one_piece_of_work(request: pytest.FixtureRequest) -> None:
    """pytest 9.2 and pytest-xdist 3.8 together drop the groups, and every worker makes every fixture."""
    group = request.node.get_closest_marker("xdist_group").args[0]
    assert group == "tests/support/test_world.py"
    if os.environ.get("PYTEST_XDIST_WORKER"):
        assert request.node.nodeid.endswith(f"@{group}")
