"""A run of two sources from its plan to its audit: ledger, evaluation by source, longer runs, other data."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from llama_mcore.checkpoint.audit import audit_run
from llama_mcore.data.manifest import build_manifest, write_manifest
from llama_mcore.errors import DataError
from tests.checkpoint.damage import edit_manifest
from tests.support.errors import check_problem, is_shown, refused
from tests.support.models import Small, write_tokens
from tests.support.product import Finished, llama_mcore, metrics, train

pytestmark = pytest.mark.process

LENGTH, BATCH = 32, 8
SETTINGS = [
    "parallel.tp=1",
    "data.train=",
    "data.valid=",
    "data.eod_mask_loss=true",
    "data.eod_token=10",
    "data.sources.prose.epochs=2",
    "data.sources.code.epochs=0.5",
    "optim.warmup_steps=0",
    "eval.interval=3",
    "eval.batches=100",
    "checkpoint.interval=3",
]
ONE_RANK = "train.micro_batch_size=8"


@dataclass(frozen=True)
class Done:
    folder: Path
    jobs: dict[str, Finished]

    def says(self, job: str) -> str:
        return self.jobs[job].output


@pytest.fixture(scope="module")
def done(small: Small, tmp_path_factory: pytest.TempPathFactory) -> Done:
    folder = tmp_path_factory.mktemp("two-sources")
    write_sources(folder)
    sources = [
        f"data.sources.prose.train={folder}/prose",
        f"data.sources.prose.valid={folder}/prose-validation",
        f"data.sources.code.train=[{folder}/code1,{folder}/code2]",
        f"data.sources.code.valid={folder}/code-validation",
    ]
    other = f"data.sources.prose.train={folder}/prose2"

    def run(run_dir: str, steps: int, *words: str, ranks: int = 1) -> Finished:
        settings = [*small.overrides(folder / run_dir), *SETTINGS, *sources, f"train.steps={steps}", *words]
        return train(settings, ranks=ranks)

    jobs = {
        "plan": run("run", 6, "--dry-run"),
        "too-long": run("run", 60),
        "first": run("run", 3, ranks=2),
    }
    shutil.copytree(folder / "run", folder / "changed")
    jobs |= {
        "longer": run("run", 6, ONE_RANK),
        "at-once": run("at-once", 6, ONE_RANK),
        "masked": run("two-ranks", 6, ranks=2),
        "audit": llama_mcore("audit-data", folder / "run"),
        "refused": run("changed", 6, ONE_RANK, other),
        "accepted": run("changed", 6, ONE_RANK, other, "--accept-data-change"),
        "goes-on": run("changed", 8, ONE_RANK, other),
        "audit-changed": llama_mcore("audit-data", folder / "changed"),
    }
    return Done(folder, jobs)


def write_sources(folder: Path) -> None:
    """Token 10 closes documents of 20 tokens. Training text has ids below 100, validation text above."""
    sizes = {
        "prose": 30,
        "prose2": 25,
        "code1": 50,
        "code2": 40,
        "prose-validation": 3,
        "code-validation": 11,
    }
    for seed, (name, windows) in enumerate(sizes.items()):
        low = 100 if "validation" in name else 11
        ids = np.random.default_rng(seed).integers(low, low + 80, windows * LENGTH + 1)
        ids[19::20] = 10
        write_tokens(folder / name, [ids])
        write_manifest(folder / name, build_manifest(folder / name, text_bytes=4 * len(ids)))


def test_all_jobs_end_as_they_should(done: Done) -> None:
    bad_data = {"too-long", "refused"}
    for name, job in done.jobs.items():
        assert job.exit_code == (65 if name in bad_data else 0), f"{name}: {job.output}"


def test_the_plan_is_shown_before_a_run(done: Done) -> None:
    lines = [line.split() for line in done.says("plan").splitlines()]
    begin = next(number for number, words in enumerate(lines) if words[:2] == ["source", "tokens"])
    assert lines[begin : begin + 3] == [
        ["source", "tokens", "share", "available", "epochs", "at", "most"],
        ["prose", "896", "58.33%", "960", "0.93", "2.00"],
        ["code", "640", "41.67%", "2,880", "0.22", "0.50"],
    ]


def test_a_run_beyond_the_plan_is_refused_with_the_table(done: Done) -> None:
    said = done.says("too-long")
    assert is_shown(said, "source prose", "274 windows")
    assert all(number in said for number in ("480 samples", "60 planned", "sample 105"))
    assert "available" in said


def test_the_ledger_is_in_every_step_and_in_the_checkpoint(done: Done) -> None:
    rows = metrics(done.folder / "run")
    assert [sum(row["windows"].values()) for row in rows] == [BATCH * row["step"] for row in rows]
    for row in rows:
        share = 60 / 105
        assert abs(row["windows"]["prose"] - share * BATCH * row["step"]) < 1
    manifest = json.loads((done.folder / "run/checkpoints/step-00000006/manifest.json").read_text())
    assert manifest["windows_read"] == rows[-1]["windows"]


def test_a_run_that_was_lengthened_read_the_same_as_one_that_was_planned_long(done: Done) -> None:
    """Another number of ranks and another micro-batch size in its first half do not matter either."""
    longer, at_once = metrics(done.folder / "run"), metrics(done.folder / "at-once")
    assert [row["windows"] for row in longer] == [row["windows"] for row in at_once]
    # the learning rates of steps 2 and 3 differ, the data of step 1 is all that decides its loss
    assert longer[0]["loss"] == pytest.approx(at_once[0]["loss"], rel=1e-4)


def test_masked_losses_do_not_depend_on_how_a_batch_is_cut(done: Done) -> None:
    """Ranks and micro-batches hold different numbers of tokens that count; bf16 rounds at 4e-3."""
    for mine, theirs in zip(
        metrics(done.folder / "at-once"), metrics(done.folder / "two-ranks"), strict=True
    ):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=4e-3)
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=4e-3)


def test_evaluation_by_source(done: Done) -> None:
    row = metrics(done.folder / "at-once")[-1]
    assert list(row["valid"]) == ["prose", "code"]
    for name, windows in (("prose", 3), ("code", 11)):
        found = row["valid"][name]
        ids = np.fromfile(done.folder / f"{name}-validation.bin", np.uint16)[: windows * LENGTH]
        assert found["tokens"] == (ids != 10).sum()  # all of it, once, but for what follows an end
        assert found["perplexity"] == pytest.approx(np.exp(found["loss"]))
        assert found["bits_per_byte"] == pytest.approx(found["loss"] / np.log(2) / 4)
    total = sum(found["tokens"] for found in row["valid"].values())
    mean = sum(found["loss"] * found["tokens"] for found in row["valid"].values()) / total
    assert row["valid_loss"] == pytest.approx(mean)
    assert [row["step"] for row in metrics(done.folder / "run") if "valid" in row] == [3, 6]


def test_the_audit_of_a_run(done: Done) -> None:
    said = done.says("audit").splitlines()
    assert said[1].split()[:6] == ["prose", "57.143%", "58.333%", "896", "0.933", "2.000"]
    assert "no window was read more often than planned" in said[-1]


@pytest.fixture
def run_dir(done: Done, tmp_path: Path) -> Path:
    return Path(shutil.copytree(done.folder / "run", tmp_path / "run"))


def test_the_audit_sees_a_ledger_that_does_not_follow_the_plan(run_dir: Path) -> None:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    rows[3]["windows"]["prose"] += 1
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with refused(DataError, "step 4: windows"):
        audit_run(run_dir)


def test_the_audit_sees_lost_and_repeated_samples(run_dir: Path) -> None:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines(keepends=True)
    rows = [json.loads(line) for line in lines]
    rows[2]["tokens"] = rows[1]["tokens"]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with refused(DataError, "step 3: tokens"):
        audit_run(run_dir)


def test_the_audit_names_steps_without_a_line_and_with_two(run_dir: Path) -> None:
    metrics_file = run_dir / "metrics.jsonl"
    lines = metrics_file.read_text().splitlines(keepends=True)
    metrics_file.write_text("".join([lines[0], lines[3], *lines[3:5], *lines[4:5]]))
    with refused(DataError, f"{metrics_file}: steps", "2 to 3, 6") as caught:
        audit_run(run_dir)
    check_problem(caught.value.problems, f"{metrics_file}: steps", "4 to 5")
    assert "planned share" in str(caught.value)


@pytest.mark.parametrize("row", [{}, {"step": 3}, {"step": 3, "tokens": 1, "windows": {"a": "b"}}])
def test_the_audit_sees_a_line_that_is_no_step(run_dir: Path, row: dict) -> None:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run_dir / "metrics.jsonl").write_text("".join([*lines[:2], json.dumps(row), "\n", *lines[3:]]))
    with refused(DataError, "metrics", f"{run_dir / 'metrics.jsonl'}:3"):
        audit_run(run_dir)


def test_the_audit_sees_windows_read_too_often(run_dir: Path) -> None:
    def cap_at_10(manifest: dict) -> None:
        manifest["segments"][0]["sources"][0]["cap"] = 10

    edit_manifest(run_dir / "checkpoints/step-00000006", cap_at_10)
    with refused(DataError, "source prose", "28 windows read", remedy=False) as caught:
        audit_run(run_dir)
    assert "planned share" in str(caught.value)


def test_the_audit_of_more_windows_than_memory_holds_is_refused(run_dir: Path) -> None:
    def grow(manifest: dict) -> None:
        manifest["segments"][0]["sources"][0]["num_windows"] = 1 << 60

    edit_manifest(run_dir / "checkpoints/step-00000006", grow)
    with refused(DataError, "windows"):
        audit_run(run_dir)


def test_other_data_is_refused_and_recorded_when_accepted(done: Done) -> None:
    assert is_shown(done.says("refused"), "source prose: content")
    assert "--accept-data-change" in done.says("refused")
    manifest = json.loads((done.folder / "changed/checkpoints/step-00000008/manifest.json").read_text())
    first, second = manifest["segments"]
    assert (first["start_sample"], second["start_sample"]) == (0, 3 * BATCH)
    rows = metrics(done.folder / "changed")
    assert second["sources"][1]["first"] == rows[2]["windows"]["code"] > 0  # goes on
    assert second["sources"][0]["first"] == 0  # other text
    assert len(rows) == 8
    assert rows[-1]["windows"]["code"] > rows[2]["windows"]["code"]


def test_the_audit_follows_a_change(done: Done) -> None:
    said = done.says("audit-changed").splitlines()
    assert [line.split()[:2] for line in said[1:4]] == [
        ["prose", "gone"],
        ["code", "47.368%"],
        ["prose", "52.632%"],
    ]
    assert "over 2 plans" in said[-1]
