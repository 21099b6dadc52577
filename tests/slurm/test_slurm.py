"""The shipped scripts on a real Slurm of two virtual nodes on this machine: `make test-slurm`, as root."""

import os
import shutil
import signal
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


class Step:
    """`srun python tools/train.py`, two ranks."""

    def __init__(self, slurm: dict[str, str], *words: str) -> None:
        # the names of the virtual nodes resolve to nothing
        environ = {"MASTER_ADDR": "127.0.0.1"} | slurm
        of_train = words.index("--")
        train = [sys.executable, "tools/train.py", *words[of_train + 1 :]]
        command = ["srun", *words[:of_train], *train]
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environ, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )

    def ended(self) -> tuple[int, str]:
        said, _ = self.process.communicate(timeout=SECONDS)
        return self.process.returncode, said


ON_TWO_NODES = ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1"]
ON_ONE_NODE = ["--nodes=1", "--ntasks=2", "--gpus-per-node=2"]


@pytest.mark.parametrize("where", [ON_TWO_NODES, ON_ONE_NODE], ids=["two-nodes", "one-node"])
def test_srun_starts_the_ranks_itself(
    slurm: dict[str, str], small: Small, tmp_path: Path, where: list[str]
) -> None:
    code, said = Step(slurm, *where, "--", *SETTINGS, *small.overrides(tmp_path / "run")).ended()
    assert code == 0, said
    assert "on 2 ranks: tp 2, dp 1" in said
    assert [row["step"] for row in metrics(tmp_path / "run")] == list(range(1, 31))
    assert "Traceback" not in said


def test_a_signal_to_srun_saves_and_its_75_comes_through(
    slurm: dict[str, str], small: Small, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    settings = [*SETTINGS, *small.overrides(run_dir), "train.steps=4000", "data.epochs=200"]
    step = Step(slurm, *ON_TWO_NODES, "--", *settings)
    until = time.monotonic() + SECONDS
    while not (run_dir / "metrics.jsonl").exists() or len(metrics(run_dir)) < 3:
        assert time.monotonic() < until
        assert step.process.poll() is None, step.ended()
        time.sleep(0.2)
    step.process.send_signal(signal.SIGUSR1)
    code, said = step.ended()
    assert code == 75, said
    assert "the same command goes on" in said


def test_a_wrong_setting_comes_through_srun(slurm: dict[str, str], small: Small, tmp_path: Path) -> None:
    settings = [*SETTINGS, *small.overrides(tmp_path / "run"), "optim.warmup_steps=99"]
    code, said = Step(slurm, *ON_ONE_NODE, "--", *settings).ended()
    assert code == 64, said
    assert said.count("configuration error: optim.warmup_steps = 99") == 1


def test_an_address_that_means_nothing_is_said_and_nobody_waits(
    slurm: dict[str, str], small: Small, tmp_path: Path
) -> None:
    """The names of the virtual nodes resolve to nothing, as here where no address is given."""
    step = Step(
        slurm | {"MASTER_ADDR": ""}, *ON_TWO_NODES, "--", *SETTINGS, *small.overrides(tmp_path / "run")
    )
    code, said = step.ended()
    assert code == 69, said
    assert "MASTER_ADDR = n1" in said
