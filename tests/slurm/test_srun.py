"""`srun python tools/train.py` on a real Slurm: Slurm itself starts the ranks, without torchrun."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import SECONDS, cluster
from tests.support.models import Small
from tests.support.product import metrics
from tests.support.world import ROOT, wait_until

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.process,
    pytest.mark.skipif(shutil.which("sbatch") is None, reason="needs Slurm"),
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to start Slurm"),
]
SETTINGS = ["--config", "tiny", "eval.interval=0", "checkpoint.interval=1000", "checkpoint.keep=9"]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    with cluster(tmp_path_factory.mktemp("slurm"), 2) as environment:
        yield environment


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
    wait_until(lambda: len(metrics(run_dir)) >= 3, lambda: step.process.poll() is None)
    step.process.send_signal(signal.SIGUSR1)
    code, said = step.ended()
    assert code == 75, said
    assert "run the same command to continue" in said


def test_a_wrong_setting_comes_through_srun(slurm: dict[str, str], small: Small, tmp_path: Path) -> None:
    settings = [*SETTINGS, *small.overrides(tmp_path / "run"), "optim.warmup_steps=99"]
    code, said = Step(slurm, *ON_ONE_NODE, "--", *settings).ended()
    assert code == 64, said
    assert said.count("optim.warmup_steps = 99") == 1


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
