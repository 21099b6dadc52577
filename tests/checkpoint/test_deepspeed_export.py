"""DeepSpeed's own folder: its engine goes on from it, and its tools find our weights in it."""

import runpy
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from llama_mcore.checkpoint.deepspeed_export import save_deepspeed_folder
from llama_mcore.checkpoint.reader import CheckpointReader
from llama_mcore.checkpoint.run_dir import find_checkpoint
from llama_mcore.checkpoint.saver import save_checkpoint
from llama_mcore.checkpoint.train_state import TrainState
from llama_mcore.distributed.groups import model_parallel_groups
from tests.checkpoint.jobs import SEQUENCES, STEPS, Job, new_engine, take_steps
from tests.support.world import call, run_ranks

pytestmark = pytest.mark.process

JOBS = [
    Job("tp2-zero1", tp=2, dp=1, stage=1, precision="bf16"),
    Job("dp2-zero2", tp=1, dp=2, stage=2, precision="fp32"),
    Job("dp2-zero3", tp=1, dp=2, stage=3, precision="fp32"),
]
of_each_job = pytest.mark.parametrize("job", JOBS, ids=lambda job: job.name)

Steps = list[tuple[float, float]]
"""Loss and gradient norm of each."""


@dataclass(frozen=True)
class Trained:
    folder: Path
    """With a run folder of each job."""
    steps: dict[str, tuple[Steps, Steps]]
    """After the save, of the engine that saved and of one that loaded."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("deepspeed")
    of_first_rank, _ = run_ranks(2, train, folder)
    return Trained(folder, of_first_rank)


def train(folder: Path) -> dict[str, tuple[Steps, Steps]]:
    """Save both kinds of checkpoint, and go on from DeepSpeed's own in a new engine."""
    dist.init_process_group("gloo")
    followed = {}
    for job in JOBS:
        run = job.run_config(folder)
        with model_parallel_groups(run.parallel, 0, torch.device("cpu")) as groups:
            engine = new_engine(run, groups)
            take_steps(engine, range(STEPS), job.dp, groups)
            state = TrainState(STEPS, STEPS * SEQUENCES)
            for step in (1, 2, STEPS):  # the last two stay
                path = save_deepspeed_folder(engine, run, TrainState(step, step * SEQUENCES), groups)
            save_checkpoint(engine, run, state, groups)
            expected = take_steps(engine, range(STEPS, STEPS + 2), job.dp, groups)
            again = new_engine(run, groups)
            again.load_checkpoint(str(path.parent), tag=path.name)
            followed[job.name] = expected, take_steps(again, range(STEPS, STEPS + 2), job.dp, groups)
    dist.destroy_process_group()
    return followed


@of_each_job
def test_its_engine_goes_on_from_it(trained: Trained, job: Job) -> None:
    expected, found = trained.steps[job.name]
    assert found == expected


@of_each_job
def test_the_newest_stay_and_the_hint_names_the_last(trained: Trained, job: Job) -> None:
    folder = trained.folder / job.name / "deepspeed"
    assert sorted(path.name for path in folder.glob("step-*")) == ["step-00000002", f"step-{STEPS:08d}"]
    assert (folder / "latest").read_text() == f"step-{STEPS:08d}"


def run_tool(module: str, *words: object) -> None:
    """`python -m MODULE WORDS`, in this process."""
    sys.argv = [module, *map(str, words)]
    runpy.run_module(module, run_name="__main__")


@pytest.mark.parametrize("job", [job for job in JOBS if job.tp == 1], ids=lambda job: job.name)
def test_zero_to_fp32_finds_the_masters(trained: Trained, job: Job, tmp_path: Path) -> None:
    source = trained.folder / job.name / "deepspeed"
    call(run_tool, "deepspeed.utils.zero_to_fp32", source, tmp_path / "out")
    (file,) = (tmp_path / "out").glob("*.bin")
    found = torch.load(file, weights_only=True)
    ours = CheckpointReader(find_checkpoint(trained.folder / job.name))
    for name in ours.names():
        assert torch.equal(found[name], ours.full(name)), name


@pytest.mark.parametrize("job", JOBS[:2], ids=lambda job: job.name)
def test_its_universal_checkpoint_holds_masters_and_moments(
    trained: Trained, job: Job, tmp_path: Path
) -> None:
    source = trained.folder / job.name / f"deepspeed/step-{STEPS:08d}"
    call(
        run_tool,
        "deepspeed.checkpoint.ds_to_universal",
        *("--input_folder", source, "--output_folder", tmp_path / "universal"),
        *("--num_extract_workers", 1, "--num_merge_workers", 1),
    )
    ours = CheckpointReader(find_checkpoint(trained.folder / job.name))
    for name in ours.names():
        for kind, file in (("weight", "fp32.pt"), ("exp_avg", "exp_avg.pt"), ("exp_avg_sq", "exp_avg_sq.pt")):
            found = torch.load(tmp_path / "universal/zero" / name / file, weights_only=False)["param"]
            assert torch.equal(found.view(ours.full(name).shape), ours.full(name, kind)), f"{kind} of {name}"
