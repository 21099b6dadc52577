"""llama_mcore.checkpoint.save: asynchronous saves, and runs whose disk waits, fails or hangs."""

import json
from pathlib import Path

import pytest
import torch

from llama_mcore.checkpoint.layout import KINDS, find_checkpoint
from llama_mcore.checkpoint.reader import CheckpointReader
from tests.checkpoint.saver_jobs import FIRST, LAST, RUNS, SECOND, SLOW_S, STEPS, TIMEOUT_S, Run
from tests.conftest import Small
from tests.forked import run_worker
from tests.train.product import checkpoints, metrics

WORKER = Path(__file__).with_name("saver_jobs.py")
OF_BOTH_RANKS = pytest.mark.parametrize("rank", [0, 1])


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, small: Small) -> Path:
    folder = tmp_path_factory.mktemp("saver")
    lengths = [f"train.steps={STEPS}", "checkpoint.interval=3", "eval.interval=0", "eval.batches=1"]
    tiny = [
        word
        for word in small.overrides(folder)
        if not word.startswith(("run.dir", "train.steps", "checkpoint.", "eval."))
    ]
    run_worker(WORKER, folder, "--config", "tiny", *tiny, *lengths)
    return folder


def seen(done: Path, scenario: str, rank: int) -> dict:
    return json.loads((done / f"{scenario}-{rank}.json").read_text())


def exit_codes(done: Path, run: Run) -> list[int]:
    return json.loads((done / f"{run.name}.json").read_text())


def printed(done: Path, run: Run) -> str:
    return (done / f"{run.name}.txt").read_text()


def same_state(one: Path, other: Path) -> bool:
    readers = [CheckpointReader(find_checkpoint(path)) for path in (one, other)]
    return all(
        torch.equal(*(reader.full(name, kind) for reader in readers))
        for name in readers[0].names()
        for kind in KINDS
    )


@OF_BOTH_RANKS
def test_training_goes_on_while_the_disk_waits(done: Path, rank: int) -> None:
    """When `begin` returned nothing was written, and later `poll` did not wait either."""
    assert seen(done, "moment", rank)["seen"] == [[0, True, 1], [0, True, 4]]


@pytest.mark.parametrize("step", [1, 4])
def test_what_is_saved_is_the_state_of_the_moment(done: Path, step: int) -> None:
    """Although two steps were done before it was written; the second save uses the memory of the first."""
    saved = done / "moment" / "checkpoints" / f"step-{step:08d}"
    assert same_state(saved, done / f"moment-then-{step}")
    assert not same_state(saved, done / "moment-later")


@OF_BOTH_RANKS
def test_polling_publishes(done: Path, rank: int) -> None:
    found = seen(done, "poll_alone", rank)
    assert found["polls"] > 1
    assert found["seconds"] > SLOW_S
    assert found["stalled_s"] < found["seconds"] / 2
    if rank == 0:
        assert found["log"][-1] == "rename checkpoints/latest"


@OF_BOTH_RANKS
def test_a_save_waits_for_the_one_before(done: Path, rank: int) -> None:
    found = seen(done, "back_pressure", rank)
    assert found["steps"] == [None, 1, 2]
    assert found["stalled_s"] > SLOW_S / 2
    of_second = [number for number, line in enumerate(found["log"]) if "step-00000002" in line]
    of_first = [number for number, line in enumerate(found["log"]) if "step-00000001" in line]
    assert max(of_first) < min(of_second)


@OF_BOTH_RANKS
def test_a_full_disk_is_seen_before_anything_is_written(done: Path, rank: int) -> None:
    found = seen(done, "no_room", rank)
    enough, refused = found["said"]
    assert not enough
    assert f"rank 0: {found['need']:,} bytes are needed and {found['need'] - 1:,} are free" in refused
    assert "free space or change run.dir" in refused
    assert found["left"] == ["step-00000001"]


@OF_BOTH_RANKS
def test_two_writers_do_not_mix_in_one_folder(done: Path, rank: int) -> None:
    found = seen(done, "occupied", rank)
    assert "rank 1: File exists" in found["said"]
    assert found["left"] == ["step-00000001", "step-00000002.tmp"]


@OF_BOTH_RANKS
def test_all_ranks_learn_that_a_writer_died(done: Path, rank: int) -> None:
    found = seen(done, "dies", rank)
    assert "rank 1: MemoryError: no more" in found["said"]
    assert found["left"] == ["step-00000001", "step-00000002.tmp"]


def test_a_run_waits_for_its_last_save(done: Path) -> None:
    (slow,) = (run for run in RUNS if run.fault == "slow")
    assert exit_codes(done, slow) == [0, 0], printed(done, slow)
    assert checkpoints(done / slow.name) == [SECOND, LAST]
    CheckpointReader(find_checkpoint(done / slow.name)).check_content()


@pytest.mark.parametrize("run", [run for run in RUNS if run.fault != "slow"], ids=lambda run: run.name)
def test_a_save_that_fails_or_hangs_ends_the_run(done: Path, run: Run) -> None:
    """All ranks, with exit code 73, the reason, and the old checkpoint as it was."""
    assert exit_codes(done, run) == [73, 73], printed(done, run)
    hung = f"not written within checkpoint.timeout_s = {float(TIMEOUT_S)}"
    reason = hung if run.fault == "hang" else "Input/output error"
    assert f"rank {run.rank}: {reason}" in printed(done, run)
    assert find_checkpoint(done / run.name).name == FIRST
    reader = CheckpointReader(find_checkpoint(done / run.name))
    reader.check_content()
    assert reader.state.step == 3
    assert metrics(done / run.name)[-1]["step"] >= 6
