"""Checkpoints saved on one layout and loaded on the same and on others: nothing is lost, no bit changes."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llama_mcore.checkpoint.layout import KINDS, checkpoints_dir, find_checkpoint
from llama_mcore.checkpoint.reader import CheckpointReader
from tests.checkpoint.jobs import JOBS, STEPS, Job
from tests.train.product import tensor_bytes

LOADED = [job for job in JOBS if job.load]
SAME_LAYOUT = [job for job in LOADED if job.name.endswith("-again")]
OTHER_LAYOUT = [job for job in LOADED if job not in SAME_LAYOUT]
# The bound of tests/train/test_layouts.py; bf16 keeps 8 bits, and layouts round in other places.
TOLERANCE = {"fp32": 1e-5, "bf16": 1e-2}


def reader(saved: Path, name: str | None) -> CheckpointReader:
    return CheckpointReader(find_checkpoint(saved / str(name)))


def following(saved: Path, name: str | None) -> list[list[float]]:
    """Loss and gradient norm of the two steps after the save."""
    return json.loads((saved / f"{name}.json").read_text())


@pytest.mark.parametrize("job", LOADED, ids=lambda job: job.name)
def test_masters_and_moments_survive_to_the_last_bit(saved: Path, job: Job) -> None:
    before, after = reader(saved, job.load), reader(saved, job.name)
    assert after.state == replace(before.state, run_id=after.state.run_id)
    assert after.state.step == STEPS
    for name in before.names():
        for kind in KINDS:
            assert torch.equal(after.full(name, kind), before.full(name, kind)), f"{kind} of {name}"


@pytest.mark.parametrize("name", ["a", "b"])
def test_there_was_something_to_lose(saved: Path, name: str) -> None:
    """Trained weights and moments that are not all zero, or the test above would show nothing."""
    checkpoint = reader(saved, name)
    for parameter in checkpoint.names():
        assert checkpoint.full(parameter, "exp_avg").count_nonzero()
        assert checkpoint.full(parameter, "exp_avg_sq").count_nonzero()
    assert not torch.equal(checkpoint.full("decoder.final_layernorm.weight"), torch.ones(25))


@pytest.mark.parametrize("job", SAME_LAYOUT, ids=lambda job: job.name)
def test_on_the_same_layout_files_and_next_steps_are_the_same_bits(saved: Path, job: Job) -> None:
    before, after = find_checkpoint(saved / str(job.load)), find_checkpoint(saved / job.name)
    for path in before.glob("*.safetensors"):
        assert load_file(after / path.name).keys() == load_file(path).keys()
        assert tensor_bytes(after / path.name) == tensor_bytes(path)
    assert following(saved, job.name) == following(saved, job.load)


@pytest.mark.parametrize("job", OTHER_LAYOUT, ids=lambda job: job.name)
def test_on_another_layout_the_next_steps_agree(saved: Path, job: Job) -> None:
    expected = following(saved, job.load)
    for found, wanted in zip(following(saved, job.name), expected, strict=True):
        assert found == pytest.approx(wanted, rel=TOLERANCE[job.precision])


@pytest.mark.parametrize("job", LOADED, ids=lambda job: job.name)
def test_what_an_interrupted_save_left_is_cleaned(saved: Path, job: Job) -> None:
    assert sorted(path.name for path in checkpoints_dir(saved / job.name).iterdir()) == [
        "latest",
        f"step-{STEPS:08d}",
    ]


def test_every_rank_learns_that_one_cannot_write(saved: Path) -> None:
    messages = [(saved / f"refused-{rank}.txt").read_text() for rank in range(2)]
    assert messages[0] == messages[1]
    assert "output error: checkpoint = " in messages[0]
    assert "rank 0: " in messages[0]
