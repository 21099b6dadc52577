"""DeepSpeed's own folder: its engine goes on from it, and its tools find our weights in it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llama_mcore.checkpoint.layout import find_checkpoint
from llama_mcore.checkpoint.reader import CheckpointReader
from tests.checkpoint.deepspeed_jobs import JOBS
from tests.checkpoint.jobs import STEPS, Job
from tests.forked import run_worker

WORKER = Path(__file__).with_name("deepspeed_jobs.py")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deepspeed")
    run_worker(WORKER, folder)
    return folder


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.name)
def test_its_engine_goes_on_from_it(saved: Path, job: Job) -> None:
    expected, found = json.loads((saved / f"{job.name}.json").read_text())
    assert found == expected


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.name)
def test_the_newest_stay_and_the_hint_names_the_last(saved: Path, job: Job) -> None:
    folder = saved / job.name / "deepspeed"
    assert sorted(path.name for path in folder.glob("step-*")) == ["step-00000002", f"step-{STEPS:08d}"]
    assert (folder / "latest").read_text() == f"step-{STEPS:08d}"


def run_tool(*words: object) -> None:
    done = subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("job", [job for job in JOBS if job.tp == 1], ids=lambda job: job.name)
def test_zero_to_fp32_finds_the_masters(saved: Path, job: Job, tmp_path: Path) -> None:
    run_tool("-m", "deepspeed.utils.zero_to_fp32", saved / job.name / "deepspeed", tmp_path / "out")
    (file,) = (tmp_path / "out").glob("*.bin")
    found = torch.load(file, weights_only=True)
    ours = CheckpointReader(find_checkpoint(saved / job.name))
    for name in ours.names():
        assert torch.equal(found[name], ours.full(name)), name


@pytest.mark.parametrize("job", JOBS[:2], ids=lambda job: job.name)
def test_its_universal_checkpoint_holds_masters_and_moments(saved: Path, job: Job, tmp_path: Path) -> None:
    source = saved / job.name / f"deepspeed/step-{STEPS:08d}"
    run_tool(
        *("-m", "deepspeed.checkpoint.ds_to_universal"),
        *("--input_folder", source, "--output_folder", tmp_path / "universal", "--num_extract_workers", 1),
        *("--num_merge_workers", 1),
    )
    ours = CheckpointReader(find_checkpoint(saved / job.name))
    for name in ours.names():
        for kind, file in (("weight", "fp32.pt"), ("exp_avg", "exp_avg.pt"), ("exp_avg_sq", "exp_avg_sq.pt")):
            found = torch.load(tmp_path / "universal/zero" / name / file, weights_only=False)["param"]
            assert torch.equal(found.view(ours.full(name).shape), ours.full(name, kind)), f"{kind} of {name}"
