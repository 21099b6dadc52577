"""Start training the way a user does and watch it from outside."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]
LLAMA_MCORE = ("-m", "llama_mcore.cli", "torchrun")
PLAIN_TORCHRUN = ("-m", "torch.distributed.run")
TIMEOUT = 300


@dataclass(frozen=True)
class Finished:
    exit_code: int
    lines: list[str]
    """stdout and stderr together."""


def train(overrides: list[str], *, ranks: int = 1, launcher: tuple[str, ...] = LLAMA_MCORE) -> Finished:
    """Train in `ranks` processes; in one, without a launcher."""
    process = start(overrides, ranks=ranks, launcher=launcher)
    return finish(process)


def start(
    overrides: list[str],
    *,
    ranks: int = 1,
    launcher: tuple[str, ...] = LLAMA_MCORE,
    script: tuple[str, ...] = ("tools/train.py",),
) -> subprocess.Popen[str]:
    started_by = [*launcher, "--nproc-per-node", str(ranks)] if ranks > 1 else []
    return subprocess.Popen(
        [sys.executable, *started_by, *script, "--config", "tiny", *overrides],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> Finished:
    try:
        output, _ = process.communicate(timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return Finished(process.returncode, output.splitlines())


def stop_after_a_step(
    overrides: list[str], run_dir: Path, stop: Callable[[psutil.Process], None], launcher: tuple[str, ...]
) -> Finished:
    """Train on two ranks and call `stop` with the launcher once a step is done."""
    process = start(overrides, ranks=2, launcher=launcher)
    while not metrics(run_dir):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    stop(psutil.Process(process.pid))
    return finish(process)


def signal_launcher(number: signal.Signals) -> Callable[[psutil.Process], None]:
    return lambda launcher: launcher.send_signal(number)


def signal_one_worker(number: signal.Signals) -> Callable[[psutil.Process], None]:
    return lambda launcher: launcher.children()[-1].send_signal(number)


def metrics(run_dir: Path) -> list[dict]:
    """Whole lines of metrics.jsonl."""
    path = run_dir / "metrics.jsonl"
    content = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in content.splitlines(keepends=True) if line.endswith("\n")]


def checkpoints(run_dir: Path) -> list[str]:
    """Folders of checkpoints and what interrupted saves left; not the hint."""
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir() if path.is_dir())


def tensor_bytes(path: Path) -> bytes:
    """A safetensors file without its header, in which the id of the run differs."""
    content = path.read_bytes()
    return content[8 + int.from_bytes(content[:8], "little") :]


def left_over(run_dir: Path) -> list[list[str]]:
    """Command lines of processes that still work for the run."""
    lines = [process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])]
    return [words for words in lines if f"run.dir={run_dir}" in words]
