"""llama_mcore.checkpoint.layout and reader: which folder is a checkpoint, and what is wrong with it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from llama_mcore.checkpoint.layout import (
    KINDS,
    MANIFEST,
    checkpoints_dir,
    complete_checkpoints,
    find_checkpoint,
    fragment_key,
    parse_fragment_key,
    step_dir,
    unfinished,
)
from llama_mcore.checkpoint.reader import CheckpointReader
from llama_mcore.errors import CheckpointError, MissingInputError

FIRST_RANK = "rank-00000.safetensors"


def test_a_fragment_key_reads_back() -> None:
    name = "decoder.layers.0.mlp.linear_fc1.weight"
    assert parse_fragment_key(fragment_key("exp_avg", name, 17)) == ("exp_avg", name, 17)


def test_only_a_folder_with_a_manifest_is_complete(tmp_path: Path) -> None:
    for step in (100, 20, 3):
        step_dir(tmp_path, step).mkdir(parents=True)
        (step_dir(tmp_path, step) / MANIFEST).touch()
    (step_dir(tmp_path, 20) / MANIFEST).unlink()
    assert complete_checkpoints(tmp_path) == [step_dir(tmp_path, 3), step_dir(tmp_path, 100)]
    assert find_checkpoint(tmp_path) == step_dir(tmp_path, 100)
    assert find_checkpoint(step_dir(tmp_path, 3)) == step_dir(tmp_path, 3)


@pytest.mark.parametrize("name", ["step-00000005.tmp", "step-00000005.removed.tmp"])
def test_what_an_interruption_left_is_unfinished_even_with_a_manifest(tmp_path: Path, name: str) -> None:
    left = checkpoints_dir(tmp_path) / name
    left.mkdir(parents=True)
    (left / MANIFEST).touch()
    assert list(unfinished(tmp_path)) == [left]
    with pytest.raises(MissingInputError, match="holds no complete checkpoint"):
        find_checkpoint(tmp_path)


def test_a_folder_without_checkpoints_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match=str(tmp_path)):
        find_checkpoint(tmp_path)


@pytest.fixture
def checkpoint(saved: Path, tmp_path: Path) -> Path:
    """A checkpoint of two data-parallel ranks at stage 3, to be damaged."""
    return shutil.copytree(find_checkpoint(saved / "b"), tmp_path / "step-00000003")


def read_all(checkpoint: Path) -> None:
    reader = CheckpointReader(checkpoint)
    for name in reader.names():
        for kind in KINDS:
            reader.full(name, kind)


def refused(checkpoint: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        read_all(checkpoint)
    assert error.value.exit_code == 65
    return str(error.value)


def test_an_undamaged_copy_reads(checkpoint: Path) -> None:
    read_all(checkpoint)


def test_a_missing_rank_file_is_named(checkpoint: Path) -> None:
    (checkpoint / FIRST_RANK).unlink()
    assert FIRST_RANK in refused(checkpoint)


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_a_truncated_rank_file_is_named(checkpoint: Path, keep: int) -> None:
    path = checkpoint / FIRST_RANK
    path.write_bytes(path.read_bytes()[:keep])
    assert FIRST_RANK in refused(checkpoint)


def test_a_gap_in_a_parameter_is_named(checkpoint: Path) -> None:
    tensors = load_file(checkpoint / FIRST_RANK)
    del tensors[fragment_key("exp_avg", "output_layer.weight", 0)]
    save_file(tensors, checkpoint / FIRST_RANK)
    message = refused(checkpoint)
    assert "exp_avg of output_layer.weight = 0" in message
    assert f"where {90 * 25} are needed" in message


def test_a_rank_file_that_the_manifest_forgot_leaves_a_gap(checkpoint: Path) -> None:
    edit_manifest(checkpoint, lambda manifest: manifest["files"].pop())
    assert "are needed" in refused(checkpoint)


@pytest.mark.parametrize("content", ["", "{", "[]", "\xff"])
def test_a_manifest_that_is_none_is_refused(checkpoint: Path, content: str) -> None:
    (checkpoint / MANIFEST).write_bytes(content.encode("latin-1"))
    assert str(checkpoint) in refused(checkpoint)


def test_another_format_is_named(checkpoint: Path) -> None:
    edit_manifest(checkpoint, lambda manifest: manifest.update(format="llama_mcore/2"))
    assert "format = llama_mcore/2" in refused(checkpoint)


@pytest.mark.parametrize("key", ["step", "consumed_samples", "config", "tp_size", "files"])
def test_a_manifest_without_one_of_its_keys_is_refused(checkpoint: Path, key: str) -> None:
    edit_manifest(checkpoint, lambda manifest: manifest.pop(key))
    assert key in refused(checkpoint)


def test_a_manifest_with_an_impossible_model_is_refused(checkpoint: Path) -> None:
    edit_manifest(checkpoint, lambda manifest: manifest["config"]["model"].update(num_layers=-1))
    assert "num_layers" in refused(checkpoint)


def test_a_key_of_no_fragment_is_refused(checkpoint: Path) -> None:
    tensors = load_file(checkpoint / FIRST_RANK)
    save_file(tensors | {"weight": tensors.popitem()[1]}, checkpoint / FIRST_RANK)
    assert FIRST_RANK in refused(checkpoint)


def test_no_file_outside_the_folder_is_read(checkpoint: Path, saved: Path) -> None:
    """The manifest names a file elsewhere; the reader looks beside the manifest alone."""
    elsewhere = find_checkpoint(saved / "b") / FIRST_RANK
    (checkpoint / FIRST_RANK).unlink()
    edit_manifest(checkpoint, lambda manifest: manifest["files"][0].update(name=str(elsewhere)))
    assert str(checkpoint / FIRST_RANK) in refused(checkpoint)


def edit_manifest(checkpoint: Path, edit: Callable[[dict], object]) -> None:
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    edit(manifest)
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))
