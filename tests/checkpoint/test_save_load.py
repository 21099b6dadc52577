"""Checkpoints saved on one layout and loaded on the same and on others: nothing is lost, no bit changes."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llama_mcore.checkpoint.paths import KINDS, checkpoints_dir
from llama_mcore.checkpoint.reader import CheckpointReader
from llama_mcore.checkpoint.run_dir import find_checkpoint
from tests.checkpoint.jobs import (
    EVERY,
    OTHER_LAYOUT,
    SAME_LAYOUT,
    SAMPLE,
    SAVED,
    SAVED_BF16,
    STEPS,
    Job,
    Pair,
    save_and_load,
)
from tests.support.product import tensor_bytes
from tests.support.world import call

pytestmark = [pytest.mark.process, pytest.mark.xdist_group("saved")]

# The bound of tests/train/test_layouts.py; bf16 keeps 8 bits, and layouts round in other places.
TOLERANCE = {"fp32": 1e-5, "bf16": 1e-2}
HEADER_LENGTH = 8

of_each_pair = pytest.mark.parametrize("pair", SAMPLE, ids=lambda pair: pair.name)
of_each_saved = pytest.mark.parametrize("job", [*SAVED, *SAVED_BF16], ids=lambda job: job.name)


def reader(saved: Path, name: str) -> CheckpointReader:
    return CheckpointReader(find_checkpoint(saved / name))


def following(saved: Path, name: str) -> list[list[float]]:
    """Loss and gradient norm of the two steps after the save."""
    return json.loads((saved / f"{name}.json").read_text())


def assert_same_state(saved: Path, pair: Pair) -> None:
    """The full tensors of a checkpoint and of what a job saved that had loaded it."""
    before, after = reader(saved, pair.saved.name), reader(saved, pair.name)
    assert after.manifest.layout.model_dump() == {
        "tp": pair.loaded.tp,
        "dp": pair.loaded.dp,
        "zero_stage": pair.loaded.stage,
    }
    assert after.state == replace(before.state, run_id=after.state.run_id)
    assert after.state.step == STEPS
    for name in before.names():
        for kind in KINDS:
            assert torch.equal(after.full(name, kind), before.full(name, kind)), f"{kind} of {name}"


def assert_same_steps(saved: Path, pair: Pair) -> None:
    for found, wanted in zip(following(saved, pair.name), following(saved, pair.saved.name), strict=True):
        assert found == pytest.approx(wanted, rel=TOLERANCE[pair.loaded.precision])


@of_each_pair
def test_masters_and_moments_survive_to_the_last_bit(saved: Path, pair: Pair) -> None:
    assert_same_state(saved, pair)


@of_each_saved
def test_there_was_something_to_lose(saved: Path, job: Job) -> None:
    """Trained weights and moments that are not all zero, or the test above would show nothing."""
    checkpoint = reader(saved, job.name)
    for parameter in checkpoint.names():
        assert checkpoint.full(parameter, "exp_avg").count_nonzero()
        assert checkpoint.full(parameter, "exp_avg_sq").count_nonzero()
    assert not torch.equal(checkpoint.full("decoder.final_layernorm.weight"), torch.ones(25))


@pytest.mark.parametrize("pair", SAME_LAYOUT, ids=lambda pair: pair.name)
def test_on_the_same_layout_files_and_next_steps_are_the_same_bits(saved: Path, pair: Pair) -> None:
    before, after = find_checkpoint(saved / pair.saved.name), find_checkpoint(saved / pair.name)
    for path in before.glob("*.safetensors"):
        assert load_file(after / path.name).keys() == load_file(path).keys()
        assert tensor_bytes(after / path.name) == tensor_bytes(path)
    assert following(saved, pair.name) == following(saved, pair.saved.name)


@pytest.mark.parametrize("pair", OTHER_LAYOUT, ids=lambda pair: pair.name)
def test_on_another_layout_the_next_steps_agree(saved: Path, pair: Pair) -> None:
    assert_same_steps(saved, pair)


@pytest.mark.parametrize("dimension", ["tp", "dp", "stage"])
def test_the_sample_has_every_value_on_both_sides_and_both_directions(dimension: str) -> None:
    changes = {(getattr(pair.saved, dimension), getattr(pair.loaded, dimension)) for pair in SAMPLE}
    every = {getattr(pair.saved, dimension) for pair in EVERY}
    assert {before for before, _ in changes} == {after for _, after in changes} == every
    assert any(before < after for before, after in changes)
    assert any(before > after for before, after in changes)


@of_each_saved
def test_twelve_bytes_a_parameter_are_on_the_disk(saved: Path, job: Job) -> None:
    """Each master and moment once, whatever data and tensor parallelism replicate."""
    checkpoint, content = reader(saved, job.name), 0
    for file in checkpoint.path.glob("*.safetensors"):
        with file.open("rb") as stream:
            header = int.from_bytes(stream.read(HEADER_LENGTH), "little")
        content += file.stat().st_size - HEADER_LENGTH - header
    assert content == 12 * checkpoint.model.num_params()


@of_each_saved
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


@pytest.fixture(scope="module")
def saved_everywhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("everywhere")
    call(save_and_load, folder, EVERY, timeout_s=4 * 3600)
    return folder


@pytest.mark.crash
@pytest.mark.parametrize("pair", EVERY, ids=lambda pair: pair.name)
def test_every_layout_on_every_other(saved_everywhere: Path, pair: Pair) -> None:
    assert_same_state(saved_everywhere, pair)
    assert_same_steps(saved_everywhere, pair)
