"""Whole runs on two ranks whose loss goes wrong on part of the data: what the policy does, and does again.

Of the samples, 8 to each of 14 steps, those from 48 to 88 are bad: steps 7 to 11. Steps 7 and 8 are skipped,
then the rate is lowered; 9 and 10 are skipped too, so the run returns to step 4 and goes on with sample 80.
One bad batch is left: its update is skipped, and the rest is good.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from llama_mcore.checkpoint.audit import audit_run
from llama_mcore.checkpoint.manifest import read_manifest
from llama_mcore.config.load import load_config
from llama_mcore.data.windows import WindowDataset
from llama_mcore.errors import DataError
from llama_mcore.train.optim import learning_rate
from tests.conftest import Once
from tests.support.errors import is_shown, refused
from tests.support.models import Small
from tests.support.product import checkpoints, metrics, tensor_bytes
from tests.support.world import call
from tests.train.unhealthy import KILLED, Lived, Run, all_attempts, moved_on

pytestmark = pytest.mark.process
of_stages = pytest.mark.xdist_group("rollback-stages")
of_ahead = pytest.mark.xdist_group("rollback-ahead")
of_kills = pytest.mark.xdist_group("rollback-kills")

STEPS, BATCH, WINDOW = 14, 8, 32
BAD = (48, 88)
STAGES = {
    "fp32-zero0-dp": ["train.precision=fp32", "zero.stage=0", "parallel.tp=1"],
    "bf16-zero1-tp": ["zero.stage=1"],
    "bf16-zero2-dp": ["zero.stage=2", "parallel.tp=1"],
    "bf16-zero3-dp": ["zero.stage=3", "parallel.tp=1"],
}
WHOLE = "bf16-zero2-dp"
DP = STAGES[WHOLE]
KILLS: dict[str, tuple[int | str, ...]] = {
    "early": (6,),
    "lowered": (10,),
    "in-rollback": ("rollback",),
    "after": (12, 3),
}
LONG = ["checkpoint.interval=6", "checkpoint.keep=9"]
"""The stop in step 3 and the rollback in step 10 come in the middle of an interval."""
AHEAD = "health.replica_interval=0"
"""Each step begins before the one before is read, unless something is due; else, checked in each step, none
does."""
RUNS = {
    **{name: ([*settings, "checkpoint.keep=9"], Run(bad=BAD)) for name, settings in STAGES.items()},
    **{f"killed-{name}": (DP, Run(bad=BAD, kills=kills)) for name, kills in KILLS.items()},
    "stopped": (DP, Run(bad=BAD, stops=(6, 3))),
    **{
        f"ahead-{name}": ([*settings, *LONG, AHEAD], Run(bad=BAD, stops=(3,)))
        for name, settings in STAGES.items()
    },
    **{f"alone-{name}": ([*settings, *LONG], Run(bad=BAD)) for name, settings in STAGES.items()},
    "flipped": (["zero.stage=1"], Run(flip_after=8)),
    "one-skipped": ([*DP, "train.steps=9"], Run(bad=(48, 56))),
    "one-left-out": ([*DP, "train.steps=9"], Run(left_out=7)),
    "spikes": (DP, Run(bad=BAD, add=5.0)),
    "limits": ([*DP, "health.max_rollbacks=1"], Run(bad=(48, 200))),
    "too-short": ([*DP, "data.epochs={short}"], Run(bad=BAD)),
    "no-checkpoint": ([*DP, "checkpoint.interval=100"], Run(bad=BAD)),
}
"""Settings, and what happens."""
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


Live = Callable[[str], Lived]


@pytest.fixture(scope="module")
def lived(once: Once, small: Small) -> Live:
    """lived(name): the run of this name."""
    short = (STEPS * BATCH + 8) / WindowDataset(small.train, WINDOW, 256).num_windows

    def run(name: str) -> Lived:
        settings, asked = RUNS[name]

        def live(folder: Path) -> None:
            given = [setting.format(short=short) for setting in settings]
            call(all_attempts, folder, overrides(small, folder / "run", *given), asked)

        return Lived(once(f"rollback-{name}", live))

    return run


@pytest.fixture(scope="module")
def reference(once: Once, small: Small, lived: Live) -> Live:
    """reference(name): what began at step 4 of the run of this name, with the data after its rollback."""

    def run(name: str) -> Lived:
        other = lived(name).run_dir

        def live(folder: Path) -> None:
            moved_on(folder / "run", other, step=4, sample=80)
            call(all_attempts, folder, overrides(small, folder / "run", *STAGES[name]), Run(bad=BAD))

        return Lived(once(f"rollback-{name}-reference", live))

    return run


def computed(run_dir: Path, after: int = 0) -> list[tuple]:
    """Results and decisions of a run, without its speed."""
    keys = ("step", "loss", "grad_norm", "lr", "tokens", "windows", "skipped", "decision", "rolled_back")
    return [tuple(row.get(key) for key in keys) for row in metrics(run_dir) if row["step"] > after]


def last_tensors(run_dir: Path, step: int = STEPS) -> list[bytes]:
    files = sorted((run_dir / f"checkpoints/step-{step:08d}").glob("*.safetensors"))
    assert len(files) == 2
    return [tensor_bytes(path) for path in files]


def abandoned(run_dir: Path) -> list[dict]:
    lines = (run_dir / "metrics-abandoned.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def decisions(rows: list[dict]) -> dict[int, str]:
    """Decision after each step, without the reason."""
    return {row["step"]: row["decision"].partition(":")[0] for row in rows if "decision" in row}


@of_stages
@pytest.mark.parametrize("name", STAGES)
def test_a_run_rolls_back_jumps_and_goes_on(lived: Live, name: str) -> None:
    run = lived(name)
    assert run.exit_codes == [[0, 0]], run.output
    rows = metrics(run.run_dir)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    samples = [BATCH * n for n in (1, 2, 3, 4, *range(11, 21))]
    assert [row["tokens"] for row in rows] == [WINDOW * count for count in samples]
    assert [row["step"] for row in rows if row.get("skipped")] == [5]
    ((step, (told,)),) = [(row["step"], row["rolled_back"]) for row in rows if "rolled_back" in row]
    assert step == 5
    assert told.pop("reason")
    assert told == {"at_step": 10, "to_step": 4, "first_sample": 32, "end_sample": 80}


@of_stages
@pytest.mark.parametrize("name", STAGES)
def test_what_was_abandoned_is_kept_with_its_decisions(lived: Live, small: Small, name: str) -> None:
    rows = abandoned(lived(name).run_dir)
    assert [row["step"] for row in rows] == list(range(5, 11))
    assert decisions(rows) == {8: "lower the learning rate", 10: "roll back"}
    optim = load_config("tiny", overrides(small, lived(name).run_dir)).optim
    for row in rows:
        scale = 0.5 if row["step"] in (9, 10) else 1
        assert row["lr"] == learning_rate(row["step"], STEPS, optim) * scale


@of_stages
@pytest.mark.parametrize("name", STAGES)
def test_it_goes_on_as_a_fresh_process_would_from_that_checkpoint(
    lived: Live, reference: Live, name: str
) -> None:
    """Weights, moments and Adam's count returned, within an engine that had gone on."""
    fresh = reference(name)
    assert fresh.exit_codes == [[0, 0]], fresh.output
    assert computed(fresh.run_dir) == computed(lived(name).run_dir, after=4)
    assert last_tensors(lived(name).run_dir) == last_tensors(fresh.run_dir)


@of_stages
@pytest.mark.parametrize("name", STAGES)
def test_signs_of_life_come_all_through_a_rollback(lived: Live, name: str) -> None:
    ranks = [lived(name).phases(rank) for rank in range(2)]
    saves = [[told[2:] for told in rank if told[:2] == ["save", 10]] for rank in ranks]
    for (beats, worked), *_ in saves:
        assert beats == 2
        assert worked >= READS
    told_alike = [[told[:3] for told in rank] for rank in ranks]
    assert told_alike[0] == told_alike[1]  # else one would seem to be behind


@of_stages
@pytest.mark.parametrize("name", STAGES)
def test_signs_of_life_come_all_through_a_start(reference: Live, name: str) -> None:
    for rank in range(2):
        told = reference(name).phases(rank)
        assert told[0][:2] == ["setup", 0]
        assert told[0][3] >= READS


@of_ahead
@pytest.mark.parametrize("name", STAGES)
def test_what_began_in_vain_leaves_no_trace(lived: Live, name: str) -> None:
    """A stop and a rollback each discard a step that has begun. All is as where none begins early."""
    ahead, alone = lived(f"ahead-{name}"), lived(f"alone-{name}")
    assert (ahead.exit_codes, alone.exit_codes) == ([[75, 75], [0, 0]], [[0, 0]]), ahead.output
    assert (ahead.discarded, alone.discarded) == ([1, 1], [])
    assert checkpoints(ahead.run_dir) == ["step-00000003", *checkpoints(alone.run_dir)]
    assert computed(ahead.run_dir) == computed(alone.run_dir)
    assert decisions(abandoned(ahead.run_dir)) == {8: "lower the learning rate", 10: "roll back"}
    assert last_tensors(ahead.run_dir) == last_tensors(alone.run_dir)


@of_kills
@pytest.mark.parametrize("name", KILLS)
def test_a_killed_run_decides_and_computes_the_same(lived: Live, name: str) -> None:
    killed, whole = lived(f"killed-{name}"), lived(WHOLE)
    attempts = [[KILLED, KILLED]] * len(KILLS[name])
    assert killed.exit_codes == [*attempts, [0, 0]], killed.output
    assert computed(killed.run_dir) == computed(whole.run_dir)
    assert last_tensors(killed.run_dir) == last_tensors(whole.run_dir)


@of_kills
def test_checkpoints_of_signals_change_no_decision(lived: Live) -> None:
    """Saved at step 6, and at step 9 while updates were skipped: the run returns to step 4 all the same,
    which was kept, and what it gave up is put aside."""
    stopped, whole = lived("stopped"), lived(WHOLE)
    assert stopped.exit_codes == [[75, 75], [75, 75], [0, 0]], stopped.output
    assert computed(stopped.run_dir) == computed(whole.run_dir)
    assert last_tensors(stopped.run_dir) == last_tensors(whole.run_dir)
    assert checkpoints(stopped.run_dir) == ["abandoned-step-00000009", "step-00000014"]


def test_copies_that_differ_are_not_saved(lived: Live) -> None:
    flipped = lived("flipped")
    assert flipped.exit_codes == [[70, 70]]
    assert "decoder.final_layernorm.weight = rank 1 on " in flipped.output
    assert checkpoints(flipped.run_dir) == ["step-00000004"]


def test_a_skipped_update_equals_one_that_was_left_out(lived: Live) -> None:
    skipped, left_out = lived("one-skipped").run_dir, lived("one-left-out").run_dir
    assert [row["step"] for row in metrics(skipped) if row.get("skipped")] == [7]
    assert computed(skipped) == computed(left_out)
    assert last_tensors(skipped, 9) == last_tensors(left_out, 9)


def test_spikes_are_applied_and_lead_to_the_same(lived: Live) -> None:
    run = lived("spikes")
    assert run.exit_codes == [[0, 0]], run.output
    rows = abandoned(run.run_dir)
    assert decisions(rows) == {8: "lower the learning rate", 10: "roll back"}
    assert not any(row.get("skipped") for row in rows)
    assert [row["step"] for row in metrics(run.run_dir)] == list(range(1, STEPS + 1))


@of_stages
def test_the_audit_tells_what_was_abandoned(lived: Live) -> None:
    run_dir = lived(WHOLE).run_dir
    (told,) = [line for line in audit_run(run_dir).splitlines() if "abandoned" in line]
    assert all(part in told for part in ("32 to 80", "step 10", "step 4"))
    manifest = read_manifest(run_dir / f"checkpoints/step-{STEPS:08d}")
    assert sum(manifest.windows_read.values()) == manifest.consumed_samples == 160
    assert manifest.health is not None
    assert manifest.health.skipped == 1


@of_stages
def test_the_audit_finds_a_step_that_read_what_was_abandoned(lived: Live, tmp_path: Path) -> None:
    shutil.copytree(lived(WHOLE).run_dir, tmp_path / "run")
    rows = metrics(tmp_path / "run")
    rows[4] |= {"tokens": 72 * WINDOW, "windows": {"train": 72}}
    assert list(rows[5]["windows"]) == ["train"]
    (tmp_path / "run/metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    with refused(DataError, "step 5: samples", 72, remedy=False):
        audit_run(tmp_path / "run")


def test_at_the_limit_the_run_stops_and_keeps_what_it_has(lived: Live) -> None:
    limits = lived("limits")
    assert limits.exit_codes == [[70, 70]]
    assert is_shown(limits.output, "step")
    assert "1 rollbacks" in limits.output
    assert checkpoints(limits.run_dir) == ["step-00000004"]


def test_without_data_to_jump_to_it_says_so_and_stays(lived: Live) -> None:
    run = lived("too-short")
    assert run.exit_codes == [[70, 70]]
    assert is_shown(run.output, "step 10", remedy=False)
    assert is_shown(run.output, "source train")
    manifest = read_manifest(run.run_dir / "checkpoints/step-00000004")
    assert manifest.consumed_samples == 32


def test_without_a_checkpoint_there_is_nothing_to_return_to(lived: Live) -> None:
    run = lived("no-checkpoint")
    assert run.exit_codes == [[70, 70]]
    assert is_shown(run.output, "step 10")
    assert checkpoints(run.run_dir) == []
