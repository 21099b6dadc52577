"""The product as a user starts it, and its run folders as a user reads them.

`llama_mcore` runs a command in forked ranks, which are told what a launcher tells them; `start` goes through
a real launcher, for tests of launchers.
"""

import json
import os
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.support.world import ONE_THREAD, PYTHONPATH, ROOT, TIMEOUT_S, Call, exit_codes_of

TORCHRUN = ("-m", "llama_mcore.cli", "torchrun")
PLAIN_TORCHRUN = ("-m", "torch.distributed.run")


@dataclass(frozen=True)
class Finished:
    exit_codes: list[int]
    """Of each forked rank; of a launcher one."""
    output: str
    """stdout and stderr together."""

    @property
    def lines(self) -> list[str]:
        return self.output.splitlines()

    @property
    def exit_code(self) -> int:
        (code,) = set(self.exit_codes)
        return code


def llama_mcore(*words: object, ranks: int = 1) -> Finished:
    """`llama-mcore WORDS` in so many forked ranks."""
    return Job(words, ranks).finish()


def train(overrides: list[str], *flags: str, ranks: int = 1) -> Finished:
    """`llama-mcore train --config tiny` in so many forked ranks."""
    return llama_mcore("train", "--config", "tiny", *overrides, *flags, ranks=ranks)


class Job:
    """A command at work in forked ranks."""

    def __init__(self, words: tuple[object, ...], ranks: int) -> None:
        self._call = Call(exit_codes_of, ranks, run_command, [str(word) for word in words])

    def is_alive(self) -> bool:
        return self._call.is_alive()

    def ranks(self) -> list[psutil.Process]:
        """What a launcher would have started: supervisors, each the parent of one that trains. None if all
        have ended."""
        with suppress(psutil.NoSuchProcess):
            return psutil.Process(self._call.pid).children()
        return []

    def finish(self) -> Finished:
        codes = self._call.result()
        return Finished(codes, self._call.output)


def run_command(words: list[str]) -> None:
    """`llama-mcore WORDS` in this process, which ends with it."""
    from llama_mcore import cli

    sys.argv = ["llama-mcore", *words]
    cli.main()


def launched_environment() -> dict[str, str]:
    """Environment for real processes, which must find out for themselves that there is no GPU to use."""
    environment = os.environ | ONE_THREAD | {"PYTHONPATH": PYTHONPATH}
    environment.pop("DS_ACCELERATOR", None)
    return environment


def start(
    overrides: list[str],
    *,
    ranks: int = 1,
    launcher: tuple[str, ...] = TORCHRUN,
    script: tuple[str, ...] = ("tools/train.py",),
) -> subprocess.Popen[str]:
    """Start to train under a real launcher; in one rank, without one."""
    started_by = [*launcher, "--nproc-per-node", str(ranks)] if ranks > 1 else []
    return subprocess.Popen(
        [sys.executable, *started_by, *script, "--config", "tiny", *overrides],
        cwd=ROOT,
        env=launched_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> Finished:
    try:
        output, _ = process.communicate(timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return Finished([process.returncode], output)


def metrics(run_dir: Path) -> list[dict]:
    """Whole lines of metrics.jsonl."""
    path = run_dir / "metrics.jsonl"
    content = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in content.splitlines(keepends=True) if line.endswith("\n")]


def numbers(run_dir: Path) -> list[tuple]:
    """Results of a run, without its speed."""
    return [
        (row["step"], row["loss"], row["grad_norm"], row["lr"], row["tokens"], row.get("valid"))
        for row in metrics(run_dir)
    ]


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
