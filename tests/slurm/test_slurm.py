"""The shipped scripts on a real Slurm of two virtual nodes on this machine: `make test-slurm`, as root."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import Small
from tests.train.product import ROOT, metrics

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(shutil.which("sbatch") is None, reason="needs Slurm"),
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to start Slurm"),
]
LOCAL = Path(__file__).with_name("slurm-local.sh")
SECONDS = 400  # a job that was requeued waits for two minutes
SETTINGS = ["--config", "tiny", "eval.interval=0", "checkpoint.interval=1000", "checkpoint.keep=9"]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of one who may submit."""
    folder = tmp_path_factory.mktemp("slurm")
    subprocess.run(["bash", str(LOCAL), "start", str(folder), "2"], check=True, timeout=120)
    commands = Path(sys.executable).parent
    yield {
        **os.environ,
        "SLURM_CONF": str(folder / "slurm.conf"),
        "PATH": f"{commands}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    subprocess.run(["bash", str(LOCAL), "stop", str(folder)], check=True, timeout=60)


class Job:
    def __init__(self, slurm: dict[str, str], folder: Path, *settings: str) -> None:
        self._slurm, self._output = slurm, folder / "output.txt"
        options = ["--parsable", "--nodes=2", "--gpus-per-node=1", f"--output={self._output}"]
        self._id = self._call("sbatch", *options, "slurm/65b.sh", *settings).strip()

    def ended(self) -> str:
        """Its exit code, as Slurm says it, once it has left the queue."""
        return self._wait_for(lambda: self._call("squeue", "--noheader", f"--jobs={self._id}") == "") and (
            self._field("ExitCode")
        )

    def restarts(self) -> int:
        return int(self._field("Restarts"))

    def signal(self, name: str) -> None:
        """As Slurm does ahead of a time limit: to the script alone."""
        self._call("scancel", f"--signal={name}", "--batch", self._id)

    def wait_for_steps(self, run_dir: Path, count: int) -> None:
        self._wait_for(lambda: run_dir.is_dir() and len(metrics(run_dir)) >= count)

    def said(self) -> str:
        return self._output.read_text()

    def _wait_for(self, holds) -> bool:  # type: ignore[no-untyped-def]
        until = time.monotonic() + SECONDS
        while not holds():
            assert time.monotonic() < until, self.said()
            time.sleep(0.2)
        return True

    def _field(self, name: str) -> str:
        shown = self._call("scontrol", "show", "job", self._id)
        return next(word.partition("=")[2] for word in shown.split() if word.startswith(f"{name}="))

    def _call(self, *words: str) -> str:
        done = subprocess.run(words, cwd=ROOT, env=self._slurm, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout


def test_a_job_on_two_nodes_finishes(slurm: dict[str, str], small: Small, tmp_path: Path) -> None:
    job = Job(slurm, tmp_path, *SETTINGS, *small.overrides(tmp_path / "run"))
    assert job.ended() == "0:0", job.said()
    assert [row["step"] for row in metrics(tmp_path / "run")] == list(range(1, 31))
    assert "Traceback" not in job.said()


def test_a_wrong_setting_ends_it_with_64(slurm: dict[str, str], small: Small, tmp_path: Path) -> None:
    job = Job(slurm, tmp_path, *SETTINGS, *small.overrides(tmp_path / "run"), "optim.warmup_steps=99")
    assert job.ended() == "64:0"
    assert "optim.warmup_steps = 99" in job.said()
    assert job.restarts() == 0


def test_a_signal_saves_and_requeues_and_it_goes_on(
    slurm: dict[str, str], small: Small, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    settings = [*SETTINGS, *small.overrides(run_dir), "train.steps=400", "data.epochs=20"]
    job = Job(slurm, tmp_path, *settings)
    job.wait_for_steps(run_dir, 5)
    job.signal("USR1")
    assert job.ended() == "0:0", job.said()
    assert job.restarts() == 1
    assert [row["step"] for row in metrics(run_dir)] == list(range(1, 401))
    assert "resuming at step" in job.said()
    assert "Traceback" not in job.said()
