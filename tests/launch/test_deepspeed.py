"""DeepSpeed's own launcher with a hostfile: a real run of two ranks on this machine."""

import os
import signal
import sys
from pathlib import Path

import psutil
import pytest

from tests.support.errors import is_shown
from tests.support.models import Small
from tests.support.product import metrics
from tests.support.world import ROOT, Call, exit_codes_of, reserved_port, wait_until

pytestmark = pytest.mark.process


def start(folder: Path, port: int, *settings: str) -> Call:
    """All that the `deepspeed` program does: it starts a launcher for this node, which starts the ranks."""
    hosts = folder / "hosts"
    hosts.write_text("localhost slots=2\n")
    where = ["--hostfile", str(hosts), "--no_ssh", "--node_rank", "0", "--master_addr", "127.0.0.1"]
    words = [*where, "--master_port", str(port), "tools/train.py", "--config", "tiny", *settings]
    return Call(exit_codes_of, 1, deepspeed, ["--quiet", *words])


def deepspeed(words: list[str]) -> None:
    from deepspeed.launcher import runner

    for name in ("DS_ACCELERATOR", "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        del os.environ[name]  # a user's shell has none of them
    os.chdir(ROOT)
    # the program starts others by name
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    runner.main(words)


def rank_1(job: Call) -> psutil.Process:
    """The one of its two processes that watches the other."""
    started = psutil.Process(job.pid).children(recursive=True)
    of_rank = [process for process in started if "--local_rank=1" in process.cmdline()]
    return next(process for process in of_rank if process.parent() not in of_rank)


def test_a_signal_to_one_rank_saves_and_its_75_comes_through(small: Small, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    endless = ["train.steps=3000", "data.epochs=200", "eval.interval=0"]
    with reserved_port() as port:
        job = start(tmp_path, port, *small.overrides(run_dir), *endless)
        wait_until(lambda: len(metrics(run_dir)) >= 2, job.is_alive)
        rank_1(job).send_signal(signal.SIGUSR1)
        assert job.result() == [75], job.output
    assert "on 2 ranks: tp 2, dp 1" in job.output
    assert "run the same command to continue" in job.output
    assert "Traceback" not in job.output


def test_a_wrong_setting_ends_it_with_64(small: Small, tmp_path: Path) -> None:
    with reserved_port() as port:
        job = start(tmp_path, port, *small.overrides(tmp_path / "run"), "optim.warmup_steps=99")
        assert job.result() == [64], job.output
    assert is_shown(job.output, "optim.warmup_steps", 99, remedy=False)
    assert job.output.count("optim.warmup_steps = 99") == 1
