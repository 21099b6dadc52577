"""DeepSpeed's own launcher with a hostfile: a real run of two ranks on this machine."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

from tests.conftest import Small
from tests.distributed import ROOT, on_cpu
from tests.train.product import TIMEOUT, metrics

PROGRAM = Path(sys.executable).with_name("deepspeed")


def start(folder: Path, *settings: str) -> "subprocess.Popen[str]":
    hosts = folder / "hosts"
    hosts.write_text("localhost slots=2\n")
    where = ["--hostfile", hosts, "--no_ssh", "--node_rank", "0", "--master_addr", "127.0.0.1"]
    words = [sys.executable, PROGRAM, "--quiet", *where, "tools/train.py", "--config", "tiny", *settings]
    # the program starts others by name
    environ = on_cpu() | {"PATH": f"{PROGRAM.parent}:{os.environ['PATH']}"}
    output = subprocess.PIPE
    return subprocess.Popen(words, cwd=ROOT, env=environ, text=True, stdout=output, stderr=subprocess.STDOUT)


def workers(launcher: psutil.Process) -> list[psutil.Process]:
    """The program starts a launcher for this node, which starts the ranks."""
    return [process for process in launcher.children(recursive=True) if "--local_rank=1" in process.cmdline()]


def test_a_signal_to_one_rank_saves_and_its_75_comes_through(small: Small, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    job = start(tmp_path, *small.overrides(run_dir), "train.steps=3000", "data.epochs=200", "eval.interval=0")
    until = time.monotonic() + TIMEOUT
    while not (run_dir / "metrics.jsonl").exists() or len(metrics(run_dir)) < 2:
        assert time.monotonic() < until
        assert job.poll() is None, job.communicate()[0]
        time.sleep(0.1)
    workers(psutil.Process(job.pid))[0].send_signal(signal.SIGUSR1)
    said, _ = job.communicate(timeout=TIMEOUT)
    assert job.returncode == 75, said
    assert "on 2 ranks: tp 2, dp 1" in said
    assert "the same command goes on" in said
    assert "Traceback" not in said


def test_a_wrong_setting_ends_it_with_64(small: Small, tmp_path: Path) -> None:
    job = start(tmp_path, *small.overrides(tmp_path / "run"), "optim.warmup_steps=99")
    said, _ = job.communicate(timeout=TIMEOUT)
    assert job.returncode == 64
    assert said.count("configuration error: optim.warmup_steps = 99") == 1
