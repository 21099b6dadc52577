"""Whole runs on two ranks whose loss goes wrong on part of the data: what the policy does, and does again.

Of the samples, 8 to each of 14 steps, those from 48 to 88 are bad: steps 7 to 11. Steps 7 and 8 are skipped,
then the rate is lowered; 9 and 10 are skipped too, so the run returns to step 4 and goes on with sample 80.
One bad batch is left: its update is skipped, and the rest is good.
"""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest

from llama_mcore.checkpoint.audit import audit_run
from llama_mcore.checkpoint.manifest import read_manifest
from llama_mcore.config import load_run
from llama_mcore.data.dataset import WindowDataset
from llama_mcore.errors import DataError
from llama_mcore.train.schedule import learning_rate
from tests.conftest import Small
from tests.forked import run_worker
from tests.train.product import checkpoints, metrics, tensor_bytes
from tests.train.unhealthy import KILLED, Run

WORKER = Path(__file__).with_name("unhealthy.py")
STEPS, BATCH, WINDOW = 14, 8, 32
BAD = (48, 88)
STAGES = {
    "fp32-zero0-dp": ["train.precision=fp32", "zero.stage=0", "parallel.tp=1"],
    "bf16-zero1-tp": ["zero.stage=1"],
    "bf16-zero2-dp": ["zero.stage=2", "parallel.tp=1"],
    "bf16-zero3-dp": ["zero.stage=3", "parallel.tp=1"],
}
KILLS = {"early": [6], "lowered": [10], "in-rollback": ["rollback"], "after": [12, 3]}
DP = STAGES["bf16-zero2-dp"]
READS = 2 + 1 + 3 * 8
"""Of a rank that loads: the headers of both files, the content of one, and weight and moments of 8 tensors or
more."""


def overrides(small: Small, run_dir: Path, *settings: str) -> list[str]:
    return [
        *small.overrides(run_dir),
        f"train.steps={STEPS}",
        "checkpoint.interval=4",
        "checkpoint.keep=1",
        "observe.tensorboard=false",
        "eval.interval=0",
        "health.skipped_in_a_row=2",
        "health.lower_lr_steps=3",
        "health.spike_window=4",
        "health.spikes_in_a_row=2",
        "health.replica_interval=1",
        *settings,
    ]


@pytest.fixture(scope="module")
def folder(small: Small, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unhealthy")

    def run(name: str, settings: list[str], **fields: object) -> Run:
        return Run(overrides(small, folder / name, *settings), **fields)

    windows = WindowDataset(small.train, WINDOW, 256).num_windows
    short = f"data.epochs={(STEPS * BATCH + 8) / windows}"
    runs = [
        *(run(name, [*settings, "checkpoint.keep=9"], bad=BAD) for name, settings in STAGES.items()),
        *(
            run(f"{name}-reference", settings, bad=BAD, resume_from=[str(folder / name), 4, 80])
            for name, settings in STAGES.items()
        ),
        *(run(f"killed-{name}", DP, bad=BAD, kills=kills) for name, kills in KILLS.items()),
        run("stopped", DP, bad=BAD, stops=[6, 3]),
        run("flipped", ["zero.stage=1"], flip_after=8),
        run("one-skipped", [*DP, "train.steps=9"], bad=(48, 56)),
        run("one-left-out", [*DP, "train.steps=9"], left_out=7),
        run("spikes", DP, bad=(48, 88), add=5.0),
        run("limits", [*DP, "health.max_rollbacks=1"], bad=(48, 200)),
        run("too-short", [*DP, short], bad=BAD),
        run("no-checkpoint", [*DP, "checkpoint.interval=100"], bad=BAD),
    ]
    (folder / "runs.json").write_text(json.dumps([asdict(run) for run in runs]))
    run_worker(WORKER, folder / "runs.json")
    return folder


def exit_codes(folder: Path, name: str) -> list[list[int]]:
    return json.loads((folder / f"{name}.exit_codes.json").read_text())


def said(folder: Path, name: str) -> str:
    return (folder / f"{name}.txt").read_text()


def computed(run_dir: Path, after: int = 0) -> list[tuple]:
    """What a run computed and decided, without how fast it was."""
    keys = ("step", "loss", "grad_norm", "lr", "tokens", "windows", "skipped", "decision", "rolled_back")
    return [tuple(row.get(key) for key in keys) for row in metrics(run_dir) if row["step"] > after]


def last_tensors(run_dir: Path, step: int = STEPS) -> list[bytes]:
    files = sorted((run_dir / f"checkpoints/step-{step:08d}").glob("*.safetensors"))
    assert len(files) == 2
    return [tensor_bytes(path) for path in files]


@pytest.mark.parametrize("name", STAGES)
def test_a_run_rolls_back_jumps_and_goes_on(folder: Path, name: str) -> None:
    assert exit_codes(folder, name) == [[0, 0]], said(folder, name)
    rows = metrics(folder / name)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    samples = [BATCH * n for n in (1, 2, 3, 4, *range(11, 21))]
    assert [row["tokens"] for row in rows] == [WINDOW * count for count in samples]
    assert [row["step"] for row in rows if row.get("skipped")] == [5]
    rollback = {"at_step": 10, "to_step": 4, "first_sample": 32, "end_sample": 80}
    told = [(row["step"], row["rolled_back"]) for row in rows if "rolled_back" in row]
    reason = "4 updates in a row were skipped: loss or gradient was not finite"
    assert told == [(5, [rollback | {"reason": reason}])]


@pytest.mark.parametrize("name", STAGES)
def test_what_was_given_up_is_kept_with_its_decisions(folder: Path, small: Small, name: str) -> None:
    lines = (folder / name / "metrics-given-up.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["step"] for row in rows] == list(range(5, 11))
    decided = {row["step"]: row["decision"].partition(":")[0] for row in rows if "decision" in row}
    assert decided == {8: "lower the learning rate", 10: "roll back"}
    optim = load_run("tiny", overrides(small, folder)).optim
    for row in rows:
        scale = 0.5 if row["step"] in (9, 10) else 1
        assert row["lr"] == learning_rate(row["step"], STEPS, optim) * scale


@pytest.mark.parametrize("name", STAGES)
def test_it_goes_on_as_a_fresh_process_would_from_that_checkpoint(folder: Path, name: str) -> None:
    """Weights, moments and Adam's count returned, within an engine that had gone on."""
    reference = folder / f"{name}-reference"
    assert exit_codes(folder, reference.name) == [[0, 0]], said(folder, reference.name)
    assert computed(reference) == computed(folder / name, after=4)
    assert last_tensors(folder / name) == last_tensors(reference)


@pytest.mark.parametrize("name", STAGES)
def test_signs_of_life_come_all_through_a_rollback(folder: Path, name: str) -> None:
    ranks = [json.loads(Path(f"{folder / name}.phases-{rank}.json").read_text()) for rank in range(2)]
    saves = [[told[2:] for told in rank if told[:2] == ["save", 10]] for rank in ranks]
    for (beats, worked), *_ in saves:
        assert beats == 2
        assert worked >= READS
    told_alike = [[told[:3] for told in rank] for rank in ranks]
    assert told_alike[0] == told_alike[1]  # else one would seem to be behind


@pytest.mark.parametrize("name", STAGES)
def test_signs_of_life_come_all_through_a_start(folder: Path, name: str) -> None:
    for rank in range(2):
        told = json.loads(Path(f"{folder / name}-reference.phases-{rank}.json").read_text())
        assert told[0][:2] == ["setup", 0]
        assert told[0][3] >= READS


@pytest.mark.parametrize("name", KILLS)
def test_a_killed_run_decides_and_computes_the_same(folder: Path, name: str) -> None:
    killed, whole = folder / f"killed-{name}", folder / "bf16-zero2-dp"
    lives = [[KILLED, KILLED]] * len(KILLS[name])
    assert exit_codes(folder, killed.name) == [*lives, [0, 0]], said(folder, killed.name)
    assert computed(killed) == computed(whole)
    assert last_tensors(killed) == last_tensors(whole)


def test_checkpoints_of_signals_change_no_decision(folder: Path) -> None:
    """Saved at step 6, and at step 9 while updates were skipped: the run returns to step 4 all the same,
    which was kept, and what it gave up is put aside."""
    stopped, whole = folder / "stopped", folder / "bf16-zero2-dp"
    assert exit_codes(folder, "stopped") == [[75, 75], [75, 75], [0, 0]], said(folder, "stopped")
    assert "stopped at step 9 of 14" in said(folder, "stopped")
    assert computed(stopped) == computed(whole)
    assert last_tensors(stopped) == last_tensors(whole)
    assert checkpoints(stopped) == ["given-up-step-00000009", "step-00000014"]


def test_copies_that_differ_are_not_saved(folder: Path) -> None:
    assert exit_codes(folder, "flipped") == [[70, 70]]
    assert "decoder.final_layernorm.weight = rank 1 on " in said(folder, "flipped")
    assert checkpoints(folder / "flipped") == ["step-00000004"]


def test_a_skipped_update_equals_one_that_was_left_out(folder: Path) -> None:
    skipped, left_out = computed(folder / "one-skipped"), computed(folder / "one-left-out")
    assert [row[0] for row in skipped if row[6]] == [7]
    assert skipped == left_out
    assert last_tensors(folder / "one-skipped", 9) == last_tensors(folder / "one-left-out", 9)


def test_spikes_are_applied_and_lead_to_the_same(folder: Path) -> None:
    assert exit_codes(folder, "spikes") == [[0, 0]], said(folder, "spikes")
    given_up = (folder / "spikes/metrics-given-up.jsonl").read_text().splitlines()
    decided = [(row["step"], row["decision"]) for row in map(json.loads, given_up) if "decision" in row]
    assert [(step, text.partition(":")[0]) for step, text in decided] == [
        (8, "lower the learning rate"),
        (10, "roll back"),
    ]
    assert "losses in a row stand out" in decided[-1][1]
    assert not any(json.loads(line).get("skipped") for line in given_up)
    assert [row["step"] for row in metrics(folder / "spikes")] == list(range(1, STEPS + 1))


def test_the_audit_tells_what_was_given_up(folder: Path) -> None:
    text = audit_run(folder / "bf16-zero2-dp")
    assert "Samples 32 to 80 were read and given up: after step 10 the run rolled back to step 4" in text
    manifest = read_manifest(folder / f"bf16-zero2-dp/checkpoints/step-{STEPS:08d}")
    assert sum(manifest.windows_read.values()) == manifest.consumed_samples == 160
    assert manifest.health is not None
    assert manifest.health.skipped == 1


def test_the_audit_finds_a_step_that_read_what_was_given_up(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "bf16-zero2-dp", tmp_path / "run")
    path = tmp_path / "run/metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[4] |= {"tokens": 72 * WINDOW, "windows": {"train": 72}}
    assert list(rows[5]["windows"]) == ["train"]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    with pytest.raises(DataError, match="step 5: samples = 72: must be more than the 80"):
        audit_run(tmp_path / "run")


def test_at_the_limit_the_run_stops_and_keeps_what_it_has(folder: Path) -> None:
    assert exit_codes(folder, "limits") == [[70, 70]]
    assert "1 rollbacks within 5,000 steps" in said(folder, "limits")
    assert checkpoints(folder / "limits") == ["step-00000004"]


def test_without_data_to_jump_to_it_says_so_and_stays(folder: Path) -> None:
    assert exit_codes(folder, "too-short") == [[70, 70]]
    assert "after which the data would not suffice" in said(folder, "too-short")
    manifest = read_manifest(folder / "too-short/checkpoints/step-00000004")
    assert manifest.consumed_samples == 32


def test_without_a_checkpoint_there_is_nothing_to_return_to(folder: Path) -> None:
    assert exit_codes(folder, "no-checkpoint") == [[70, 70]]
    assert "no sound checkpoint" in said(folder, "no-checkpoint")
