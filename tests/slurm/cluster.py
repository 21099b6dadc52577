"""A real Slurm of virtual nodes on this machine, and jobs on it."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from tests.support.product import launched_environment, metrics
from tests.support.world import ROOT

LOCAL = Path(__file__).with_name("slurm-local.sh")
SECONDS = 500
"""For anything to happen, on a crowded machine."""
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")


@contextmanager
def cluster(folder: Path, nodes: int) -> Iterator[dict[str, str]]:
    """Start Slurm with all its files in `folder`; the environment of one who may submit."""
    subprocess.run(["bash", str(LOCAL), "start", str(folder), str(nodes)], check=True, timeout=SECONDS)
    try:
        commands = Path(sys.executable).parent
        yield {
            **launched_environment(),
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PATH": f"{commands}:{os.environ['PATH']}",
        }
    finally:
        subprocess.run(["bash", str(LOCAL), "stop", str(folder)], check=True, timeout=60)


class Job:
    """A job submitted with `words`: options of sbatch, the script, and its arguments."""

    def __init__(self, slurm: dict[str, str], folder: Path, *words: str, cwd: Path = ROOT) -> None:
        self._slurm, self._cwd, self._output = slurm, cwd, folder / "output.txt"
        self._released_restarts = 0
        self.id = self.call("sbatch", "--parsable", f"--output={self._output}", *words).strip()

    def ended(self) -> str:
        """Its exit code, as Slurm says it, once it is over."""
        self.wait_until(lambda: self._released() in OVER)
        return self.field("ExitCode")

    def comes_back(self, restarts: int = 1) -> None:
        """Wait until it has been requeued so often, and runs."""
        self.wait_until(lambda: self._released() == "RUNNING" and self.restarts() == restarts)

    def state(self) -> str:
        return self.field("JobState")

    def restarts(self) -> int:
        return int(self.field("Restarts"))

    def nodes(self) -> list[str]:
        return self.call("scontrol", "show", "hostnames", self.field("NodeList")).split()

    def processes(self, node: str) -> list[psutil.Process]:
        """Processes of the job's step on this node, Slurm's own and all below, in order of their start."""
        for own in psutil.process_iter():
            with suppress(psutil.NoSuchProcess):
                if f"slurmstepd: [{self.id}.0]" in " ".join(own.cmdline()):
                    below = own.children(recursive=True)
                    if below and below[0].environ().get("SLURMD_NODENAME") == node:
                        return [own, *below]
        raise AssertionError(f"job {self.id} has no step on {node}")

    def signal(self, name: str) -> None:
        """Signal the script alone, as Slurm does ahead of a time limit."""
        self.call("scancel", f"--signal={name}", "--batch", self.id)

    def wait_for_steps(self, run_dir: Path, count: int) -> None:
        self.wait_until(lambda: run_dir.is_dir() and len(metrics(run_dir)) >= count)

    def said(self) -> str:
        return self._output.read_text() if self._output.exists() else ""

    def field(self, name: str) -> str:
        shown = self.call("scontrol", "show", "job", self.id)
        return next(word.partition("=")[2] for word in shown.split() if word.startswith(f"{name}="))

    def wait_until(self, holds: Callable[[], bool]) -> None:
        until = time.monotonic() + SECONDS
        while not holds():
            assert time.monotonic() < until, self.said()
            time.sleep(0.3)

    def call(self, *words: str) -> str:
        done = subprocess.run(
            words, cwd=self._cwd, env=self._slurm, capture_output=True, text=True, timeout=SECONDS
        )
        assert done.returncode == 0, f"{words}: {done.stderr}"
        return done.stdout

    def _released(self) -> str:
        """Its state. Slurm lets what was requeued wait for two minutes: a few seconds do. (Not fewer: in the
        second in which a job's credential was revoked, its new one counts as revoked too.)"""
        if self.state() == "PENDING" and self.field("Reason") == "BeginTime":
            restarts = self.restarts()
            if restarts > self._released_restarts:
                self.call("scontrol", "update", f"JobId={self.id}", "StartTime=now+5")
                self._released_restarts = restarts
        return self.state()
