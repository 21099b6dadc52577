"""`inspect-checkpoint`: what is printed of runs and checkpoints, sound and damaged, and how two differ."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from llama_mcore.checkpoint import diff as compare_module
from llama_mcore.checkpoint.diff import Comparison, compare
from llama_mcore.checkpoint.paths import KINDS, MANIFEST, checkpoints_dir
from llama_mcore.checkpoint.reader import CheckpointReader
from llama_mcore.cli import app
from llama_mcore.convert.registry import NAMES, WriteOptions, get_format
from tests.checkpoint.damage import FIRST_RANK, edit_manifest, edit_tensors
from tests.checkpoint.tiny import MODEL, tensors_of, write_checkpoint
from tests.convert.invented import SHAPES, Invented
from tests.support.errors import is_shown
from tests.support.product import launched_environment
from tests.support.world import ROOT, TIMEOUT_S

SECOND_RANK = "rank-00001.safetensors"
NORM = "decoder.final_layernorm.weight"


def run(*words: object) -> tuple[int, str, str]:
    """Exit code, stdout, stderr."""
    result = CliRunner().invoke(app, ["inspect-checkpoint", *map(str, words)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    for step in (2, 4):
        write_checkpoint(tmp_path, step, seed=step)
    return tmp_path


@pytest.fixture
def checkpoint(run_dir: Path) -> Path:
    return checkpoints_dir(run_dir) / "step-00000004"


def flip_a_bit(path: Path) -> None:
    """Flip a bit of the last byte, which is in a tensor: no size, header or name shows it."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_a_checkpoint_is_described(checkpoint: Path) -> None:
    (checkpoint / "notes.txt").touch()
    code, out, err = run(checkpoint)
    assert (code, err) == (0, "")
    facts = dict(line.split(maxsplit=1) for line in out.splitlines() if len(line.split()) > 1)
    assert facts["state"] == "complete; --verify reads every byte"
    assert facts["run"] == "5f0e"
    assert facts["step"] == "4, learning rate 3e-05"
    assert facts["tokens"] == f"{16 * MODEL.seq_length} in 16 samples"
    assert facts["parameters"] == str(
        sum(t.numel() for (kind, _), t in tensors_of(0).items() if kind == "weight")
    )
    assert facts["layout"] == "tp 2, dp 1, ZeRO 1"
    assert facts["tokenizer"] == f"SHA-256 {'cd' * 32}"
    assert facts["books"].split() == ["16", "10,000", "20,000", "ab12"]
    assert facts["size"] == f"{sum(path.stat().st_size for path in checkpoint.iterdir()):,} bytes"
    for name in (FIRST_RANK, SECOND_RANK):
        assert facts[name].split()[0] == f"{(checkpoint / name).stat().st_size:,}"
    assert "other files notes.txt" in out


def test_a_run_lists_all_its_checkpoints_with_their_state(run_dir: Path) -> None:
    (write_checkpoint(run_dir, 6) / SECOND_RANK).unlink()
    (write_checkpoint(run_dir, 8) / MANIFEST).write_bytes(b"")
    (checkpoints_dir(run_dir) / "step-00000010.tmp").mkdir()
    code, out, err = run(run_dir)
    rows = [line.split() for line in out.splitlines()]
    assert [(row[0], row[1], row[2], row[-1]) for row in rows] == [
        ("checkpoint", "step", "tokens", "state"),
        ("step-00000002", "2", "64", "complete"),
        ("step-00000004", "4", "128", "complete"),
        ("step-00000006", "6", "?", "DAMAGED"),
        ("step-00000008", "?", "?", "DAMAGED"),
        ("step-00000010.tmp", "?", "?", "unfinished"),
    ]
    assert code == 65
    of_step = {step: checkpoints_dir(run_dir) / f"step-{step:08d}" for step in (6, 8)}
    assert is_shown(err, "file", of_step[6] / SECOND_RANK, remedy=False)
    assert is_shown(err, "manifest", of_step[8] / MANIFEST, remedy=False)
    assert "step-00000010" not in err


def test_verify_finds_what_only_the_bytes_show_and_names_all_of_it(run_dir: Path) -> None:
    folders = [checkpoints_dir(run_dir) / f"step-0000000{step}" for step in (2, 4)]
    assert run(run_dir, "--verify")[0] == 0
    spoiled = [folders[0] / FIRST_RANK, folders[1] / FIRST_RANK, folders[1] / SECOND_RANK]
    for path in spoiled:
        flip_a_bit(path)
    assert run(run_dir)[0] == 0
    code, out, err = run(run_dir, "--verify")
    assert code == 65
    assert out.count("DAMAGED") == 2
    assert err.count("file = ") == 3
    assert all(is_shown(err, "file", path, remedy=False) for path in spoiled)


def test_damage_of_every_kind_is_in_one_list(checkpoint: Path) -> None:
    write_checkpoint(checkpoint / "wide", tp=4, cut=lambda full, rank, tp: {})
    wide = checkpoint / "wide/checkpoints/step-00000004"
    for rank, spoil in enumerate([Path.unlink, flip_a_bit, lambda path: os.truncate(path, 9), make_pipe]):
        spoil(wide / f"rank-0000{rank}.safetensors")
    code, _, err = run(wide, "--verify")
    assert code == 65
    for rank in range(4):
        assert is_shown(err, "file", wide / f"rank-0000{rank}.safetensors", remedy=False)


def make_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def test_verify_looks_at_what_the_tensors_are_too(checkpoint: Path) -> None:
    """Whoever sealed it."""
    edit_tensors(checkpoint, lambda tensors: tensors.pop(f"exp_avg/{NORM}/0"))
    code, out, err = run(checkpoint)
    assert code == 65
    assert "DAMAGED" in out
    assert is_shown(err, f"exp_avg of {NORM}", 0, remedy=False)


def test_an_unfinished_checkpoint_is_no_damage_and_is_not_read(run_dir: Path, checkpoint: Path) -> None:
    flip_a_bit(checkpoint / FIRST_RANK)
    checkpoint.rename(checkpoint.with_name("step-00000004.tmp"))
    code, out, _ = run(run_dir, "--verify")
    assert code == 0
    assert out.splitlines()[-1].split()[-1] == "unfinished"


@pytest.mark.parametrize("place", ["nowhere", "empty", "file"])
def test_where_there_is_no_checkpoint_that_is_said(tmp_path: Path, place: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    for options in ([], ["--diff", tmp_path / place]):
        code, out, err = run(tmp_path / place, *options)
        assert (code, out) == (66, "")
        assert str(tmp_path / place) in err


@pytest.mark.parametrize("name", [name for name in NAMES if name != "native"])
def test_a_checkpoint_of_another_format_is_named(name: str, tmp_path: Path, run_dir: Path) -> None:
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    weights = Invented(SHAPES["mha"])
    get_format(name, "").write(
        weights, foreign, WriteOptions(torch.bfloat16, weights.kinds), lambda size: None
    )
    places = [foreign, *foreign.glob("step-*")]  # of DeepSpeed: both are one
    for words in [
        *((place,) for place in places),
        (foreign, "--diff", run_dir),
        (run_dir, "--diff", foreign),
    ]:
        code, out, err = run(*words)
        assert (code, out) == (66, "")
        assert f"in the format {name}" in err
        assert "compare-checkpoints" in err


def test_json_says_the_same(run_dir: Path, checkpoint: Path) -> None:
    (checkpoint / SECOND_RANK).unlink()
    (checkpoint / "notes.txt").touch()
    code, out, _ = run(run_dir, "--json", "--verify")
    sound, damaged = json.loads(out)
    assert code == 65
    assert (sound["state"], sound["verified"], sound["tokens"], sound["problems"]) == (
        "complete",
        True,
        64,
        [],
    )
    assert sound["manifest"]["windows_read"] == {"books": 8}
    assert damaged["state"] == "damaged"
    assert damaged["extra_files"] == ["notes.txt"]
    assert len(damaged["problems"]) == 1
    assert json.loads(run(checkpoint, "--json")[1])["manifest"]["step"] == 4


def test_nothing_in_a_manifest_steers_the_terminal(checkpoint: Path) -> None:
    ledger = {"\x1b[2J": 4, "\ud800": 5}
    edit_manifest(checkpoint, lambda manifest: manifest.update(windows_read=ledger))
    (checkpoint / "\x1b[31m").touch()
    code, out, _ = run(checkpoint)
    assert code == 0
    assert all(line.isprintable() for line in out.splitlines())
    out = run(checkpoint, "--json")[1]
    assert out.isascii()
    assert "\x1b[2J" in json.loads(out)["manifest"]["windows_read"]


def test_progress_names_rate_and_time_left(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llama_mcore.progress.SECONDS_BETWEEN_LINES", 0)
    _, _, err = run(checkpoint, "--verify")
    lines = err.splitlines()
    assert len(lines) == 2  # one for each rank file
    assert all(line.startswith("verify: ") and "MB/s" in line and "s left" in line for line in lines)


@pytest.mark.process
def test_the_script_in_tools_is_the_command(checkpoint: Path) -> None:
    command = [sys.executable, "-m", "llama_mcore.cli", "inspect-checkpoint", str(checkpoint), "--verify"]
    done = subprocess.run(
        command, cwd=ROOT, env=launched_environment(), capture_output=True, text=True, timeout=TIMEOUT_S
    )
    assert done.returncode == 0
    assert "complete, every byte read" in done.stdout


# --diff


def compared(left: Path, right: Path) -> Comparison:
    return compare(CheckpointReader(left), CheckpointReader(right))


def test_a_checkpoint_is_the_same_as_itself_and_as_its_copy_on_another_layout(tmp_path: Path) -> None:
    two, one, other_run = (
        write_checkpoint(tmp_path / "two", tp=2),
        write_checkpoint(tmp_path / "one", tp=1),
        write_checkpoint(tmp_path / "run", tp=1, run_id="beef"),
    )
    assert compared(two, two).same
    found = compared(two, one)
    assert found.fields == ["layout.tp: 2 -> 1"]
    assert found.tensors == found.only_in_one == []
    assert found.compared == len(tensors_of(0))
    assert compared(one, other_run).fields == ["run_id: 5f0e -> beef"]


@pytest.mark.parametrize("chunk", [1, 3, 1 << 22])
def test_every_tensor_that_differs_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(compare_module, "CHUNK", chunk)
    left, right = (write_checkpoint(tmp_path / str(seed), tp=1 + seed, seed=seed) for seed in (0, 1))
    before, now = tensors_of(0), tensors_of(1)
    found = {(each.kind, each.parameter): each for each in compared(left, right).tensors}
    assert found.keys() == before.keys()
    for key, each in found.items():
        one, other = before[key], now[key]
        largest = max(one.abs().max(), other.abs().max())
        assert each.largest == pytest.approx(((one - other).abs().max() / largest).item())
        assert each.elements == each.numel == one.numel()


@pytest.mark.parametrize(
    ("value", "elements", "largest"),
    [
        (lambda x: x, 0, None),
        (lambda x: torch.nextafter(x, torch.tensor(9.0)), 1, pytest.approx(1e-7, rel=1)),
        (lambda x: x * float("nan"), 1, None),
        (lambda x: x * float("inf"), 1, None),
    ],
)
def test_one_element_is_enough(tmp_path: Path, value: object, elements: int, largest: object) -> None:
    left, right = (write_checkpoint(tmp_path / name, tp=1) for name in ("left", "right"))

    def edit(tensors: dict[str, Tensor]) -> None:
        tensors[f"exp_avg/{NORM}/0"][1] = value(tensors[f"exp_avg/{NORM}/0"][1])

    edit_tensors(right, edit)
    found = compared(left, right).tensors
    assert [(each.parameter, each.kind, each.elements) for each in found] == [(NORM, "exp_avg", 1)] * elements
    assert all(each.largest == largest for each in found)


def test_zeros_of_two_signs_differ_by_nothing(tmp_path: Path) -> None:
    left, right = (write_checkpoint(tmp_path / name, tp=1) for name in ("left", "right"))
    for folder, zero in ((left, 0.0), (right, -0.0)):
        edit_tensors(folder, lambda tensors, zero=zero: tensors[f"weight/{NORM}/0"].fill_(zero))
    (found,) = compared(left, right).tensors
    assert (found.elements, found.largest) == (2, 0.0)


def test_a_parameter_that_one_lacks_is_named(tmp_path: Path) -> None:
    left, right = (write_checkpoint(tmp_path / name, tp=1) for name in ("left", "right"))
    edit_manifest(right, lambda manifest: manifest["config"]["model"].update(tie_embeddings=False))

    def untie(tensors: dict[str, Tensor]) -> None:
        tensors.update({f"{kind}/output_layer.weight/0": torch.zeros(4) for kind in KINDS})

    edit_tensors(right, untie)
    found = compared(left, right)
    assert found.fields == ["config.model.tie_embeddings: True -> False"]
    assert found.only_in_one == ["output_layer.weight: missing -> [2, 2]"]
    assert not found.tensors


def test_no_more_than_a_chunk_is_read_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare_module, "CHUNK", 3)
    read = []
    local = CheckpointReader.local

    def counted(self: CheckpointReader, *where: object) -> Tensor:
        read.append(local(self, *where))
        return read[-1]

    monkeypatch.setattr(CheckpointReader, "local", counted)
    left, right = write_checkpoint(tmp_path / "left", tp=2), write_checkpoint(tmp_path / "right", tp=1)
    compared(left, right)
    assert max(tensor.numel() for tensor in read) == 3
    assert sum(tensor.numel() for tensor in read) == 2 * sum(t.numel() for t in tensors_of(0).values())


def test_diff_prints_fields_and_tensors_and_ends_with_1(run_dir: Path, checkpoint: Path) -> None:
    before = checkpoint.with_name("step-00000002")
    code, out, err = run(before, "--diff", run_dir)  # whose newest is the other one
    assert (code, err) == (1, "")
    assert "step: 2 -> 4\n" in out
    assert "windows_read.books: 8 -> 16\n" in out
    assert f"weight of {NORM} " in out
    count = len(tensors_of(0))
    assert f"{count} of {count} tensors differ, 3 fields do" in out
    code, out, _ = run(before, "--diff", checkpoint, "--json")
    assert code == 1
    assert len(json.loads(out)["tensors"]) == count
    assert run(checkpoint, "--diff", run_dir)[0] == 0


def test_diff_with_verify_reads_the_bytes_first(run_dir: Path, checkpoint: Path) -> None:
    flip_a_bit(checkpoint / FIRST_RANK)
    assert run(checkpoint.with_name("step-00000002"), "--diff", checkpoint)[0] == 1
    assert run(checkpoint.with_name("step-00000002"), "--diff", checkpoint, "--verify")[0] == 65
