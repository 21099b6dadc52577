"""llama_mcore.checkpoint.paths and reader: which folder is a checkpoint, and what is wrong with it."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from llama_mcore.checkpoint.paths import (
    KINDS,
    MANIFEST,
    abandoned_dir,
    checkpoints_dir,
    fragment_key,
    lookalikes,
    parse_fragment_key,
    step_dir,
    step_folders,
    step_of,
    unfinished,
)
from llama_mcore.checkpoint.reader import CheckpointReader
from llama_mcore.checkpoint.run_dir import complete_checkpoints, find_checkpoint
from llama_mcore.checkpoint.train_state import HealthState
from llama_mcore.errors import CheckpointError, MissingInputError
from tests.checkpoint.damage import FIRST_RANK, edit_manifest, edit_tensors
from tests.checkpoint.tiny import tensors_of, write_checkpoint
from tests.support.errors import refused


def test_a_fragment_key_reads_back() -> None:
    name = "decoder.layers.0.mlp.linear_fc1.weight"
    assert parse_fragment_key(fragment_key("exp_avg", name, 17)) == ("exp_avg", name, 17)


def test_only_a_sound_folder_with_all_its_files_is_complete(tmp_path: Path) -> None:
    for step in (100, 20, 3, 7):
        write_checkpoint(tmp_path, step)
    (step_dir(tmp_path, 20) / MANIFEST).unlink()
    (step_dir(tmp_path, 7) / FIRST_RANK).unlink()
    assert complete_checkpoints(tmp_path) == [step_dir(tmp_path, 3), step_dir(tmp_path, 100)]
    assert find_checkpoint(tmp_path) == step_dir(tmp_path, 100)
    assert find_checkpoint(step_dir(tmp_path, 3)) == step_dir(tmp_path, 3)


@pytest.mark.parametrize("name", ["step-00000005.tmp", "step-00000005.removed.tmp"])
def test_what_an_interruption_left_is_unfinished_even_with_a_manifest(tmp_path: Path, name: str) -> None:
    left = write_checkpoint(tmp_path, 5).rename(checkpoints_dir(tmp_path) / name)
    assert list(unfinished(tmp_path)) == [left]
    with pytest.raises(MissingInputError, match=str(tmp_path)):
        find_checkpoint(tmp_path)


COPIES = ["step-best", "step-55", "step-00000009.bak", "step-00000009-good", "step-00000009.tmp.bak"]


@pytest.mark.parametrize("name", COPIES)
def test_a_copy_under_a_name_of_ones_own_is_no_checkpoint_of_the_run(tmp_path: Path, name: str) -> None:
    newest = write_checkpoint(tmp_path, 7)
    copy = Path(shutil.copytree(newest, checkpoints_dir(tmp_path) / name))
    assert step_folders(tmp_path) == [newest]
    assert find_checkpoint(tmp_path) == newest
    assert list(unfinished(tmp_path)) == []
    assert lookalikes(tmp_path) == [name]
    assert find_checkpoint(copy) == copy  # named, it is one


def test_a_checkpoint_whose_name_is_being_taken_counts(tmp_path: Path) -> None:
    replaced = write_checkpoint(tmp_path, 5).rename(checkpoints_dir(tmp_path) / "step-00000005.replaced")
    assert step_folders(tmp_path) == [replaced]
    assert step_of(replaced) == 5
    assert lookalikes(tmp_path) == []


def test_a_folder_without_checkpoints_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match=str(tmp_path)):
        find_checkpoint(tmp_path)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A checkpoint of two data-parallel ranks, to be damaged."""
    return write_checkpoint(tmp_path, tp=1, dp=2)


def read_all(checkpoint: Path) -> None:
    reader = CheckpointReader(checkpoint)
    for name in reader.names():
        for kind in KINDS:
            reader.full(name, kind)


def refusal(checkpoint: Path, field: str, value: object) -> str:
    with refused(CheckpointError, field, value, remedy=False) as caught:
        read_all(checkpoint)
    return str(caught.value)


def test_an_undamaged_copy_reads(checkpoint: Path) -> None:
    read_all(checkpoint)


def test_a_missing_rank_file_is_named(checkpoint: Path) -> None:
    (checkpoint / FIRST_RANK).unlink()
    refusal(checkpoint, "file", checkpoint / FIRST_RANK)


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_a_truncated_rank_file_is_named(checkpoint: Path, keep: int) -> None:
    path = checkpoint / FIRST_RANK
    path.write_bytes(path.read_bytes()[:keep])
    refusal(checkpoint, "file", path)


def test_a_gap_in_a_parameter_is_named(checkpoint: Path) -> None:
    """The message has the size of what is left, half."""
    name, numel = next((name, full.numel()) for (kind, name), full in tensors_of(0).items())
    edit_tensors(checkpoint, lambda tensors: tensors.pop(fragment_key("exp_avg", name, 0)))
    assert f"{numel} are needed" in refusal(checkpoint, f"exp_avg of {name}", numel // 2)


def test_a_rank_file_that_the_manifest_forgot_is_missed(checkpoint: Path) -> None:
    edit_manifest(checkpoint, lambda manifest: manifest["files"].pop())
    refusal(checkpoint, "manifest", checkpoint / MANIFEST)


@pytest.mark.parametrize("content", ["", "{", "[]", "\xff"])
def test_a_manifest_that_is_none_is_refused(checkpoint: Path, content: str) -> None:
    (checkpoint / MANIFEST).write_bytes(content.encode("latin-1"))
    with pytest.raises(CheckpointError, match=str(checkpoint)):
        read_all(checkpoint)


def test_another_format_is_named(checkpoint: Path) -> None:
    edit_manifest(checkpoint, lambda manifest: manifest.update(format="llama_mcore/2"))
    with refused(CheckpointError, "format", "llama_mcore/2"):
        read_all(checkpoint)


KEYS = ["run_id", "step", "consumed_samples", "lr", "segments", "windows_read", "config", "layout", "files"]


@pytest.mark.parametrize("key", KEYS)
def test_a_manifest_without_one_of_its_keys_is_refused(checkpoint: Path, key: str) -> None:
    edit_manifest(checkpoint, lambda manifest: manifest.pop(key))
    assert key in refusal(checkpoint, "manifest", checkpoint / MANIFEST)


def test_a_manifest_with_an_impossible_model_is_refused(checkpoint: Path) -> None:
    edit_manifest(checkpoint, lambda manifest: manifest["config"]["model"].update(num_layers=-1))
    assert "num_layers" in refusal(checkpoint, "manifest", checkpoint / MANIFEST)


def test_a_key_of_no_fragment_is_refused(checkpoint: Path) -> None:
    edit_tensors(checkpoint, lambda tensors: tensors.update(weight=tensors.popitem()[1]))
    refusal(checkpoint, "file", checkpoint / FIRST_RANK)
    edit_tensors(checkpoint, lambda tensors: tensors.update({"weight/no.such/0": tensors.pop("weight")}))
    assert "weight/no.such/0" in refusal(checkpoint, "file", checkpoint / FIRST_RANK)


@pytest.mark.parametrize("name", ["../step-00000003/rank-00000.safetensors", "/etc/passwd", "a/rank-00000"])
def test_a_name_that_leads_out_of_the_folder_is_refused(checkpoint: Path, name: str) -> None:
    edit_manifest(checkpoint, lambda manifest: manifest["files"][0].update(name=name))
    assert "files.0.name" in refusal(checkpoint, "manifest", checkpoint / MANIFEST)


@pytest.mark.parametrize("key", ["run_id", "step", "rank"])
def test_a_file_of_another_run_step_or_rank_is_refused(checkpoint: Path, key: str) -> None:
    edit_tensors(checkpoint, lambda tensors: None, {key: "7"})
    assert f"'{key}': '7'" in refusal(checkpoint, "file", checkpoint / FIRST_RANK)


def test_exchanged_rank_files_are_refused(checkpoint: Path) -> None:
    """Even if the manifest is exchanged with them, hashes included."""
    first, second = (checkpoint / f"rank-0000{rank}.safetensors" for rank in range(2))
    first.rename(checkpoint / "kept")
    second.rename(first)
    (checkpoint / "kept").rename(second)

    def exchange(manifest: dict) -> None:
        one, two = manifest["files"]
        for key in ("bytes", "sha256"):
            one[key], two[key] = two[key], one[key]

    edit_manifest(checkpoint, exchange)
    refusal(checkpoint, "file", checkpoint / FIRST_RANK)


def test_a_checkpoint_from_before_health_was_remembered_still_loads(tmp_path: Path) -> None:
    """The run counts as healthy, and a rollback may return to the checkpoint."""
    folder = write_checkpoint(tmp_path, step=4)
    content = json.loads((folder / MANIFEST).read_text())
    del content["health"], content["manifest_sha256"]
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
    signed = {"manifest_sha256": hashlib.sha256(canonical).hexdigest(), **content}
    (folder / MANIFEST).write_text(json.dumps(signed))
    assert CheckpointReader(folder).state.health == HealthState(last_scheduled=4)


def test_abandoned_checkpoints_get_free_names_and_are_none(tmp_path: Path) -> None:
    for name in ("abandoned-step-00000004", "abandoned-step-00000004.1"):
        folder = write_checkpoint(tmp_path, step=4)
        folder.rename(abandoned_dir(folder))
        assert (folder.parent / name).is_dir()
    assert step_folders(tmp_path) == []
