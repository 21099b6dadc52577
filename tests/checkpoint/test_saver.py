"""llama_mcore.checkpoint.saver: asynchronous saves, and runs whose disk waits, fails or hangs."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from llama_mcore.checkpoint.paths import KINDS
from llama_mcore.checkpoint.reader import CheckpointReader
from llama_mcore.checkpoint.run_dir import find_checkpoint
from tests.checkpoint.saver_jobs import (
    FIRST,
    LAST,
    POLLS,
    RING_BYTES,
    RUNS,
    SECOND,
    SLOW_S,
    STEPS,
    TIMEOUT_S,
    Run,
    play,
    train,
)
from tests.support.errors import is_shown
from tests.support.models import Small
from tests.support.product import Finished, checkpoints, metrics
from tests.support.world import Call, exit_codes_of, run_ranks

pytestmark = pytest.mark.process
OF_BOTH_RANKS = pytest.mark.parametrize("rank", [0, 1])


@dataclass(frozen=True)
class Played:
    folder: Path
    seen: list[dict[str, dict]]
    """Observations of each rank, by the name of the scenario."""


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Played:
    folder = tmp_path_factory.mktemp("saver")
    return Played(folder, run_ranks(2, play, folder))


def same_state(one: Path, other: Path) -> bool:
    readers = [CheckpointReader(find_checkpoint(path)) for path in (one, other)]
    return all(
        torch.equal(*(reader.full(name, kind) for reader in readers))
        for name in readers[0].names()
        for kind in KINDS
    )


@OF_BOTH_RANKS
def test_training_goes_on_while_the_disk_waits(played: Played, rank: int) -> None:
    """Nothing was written when `begin` returned, and later `poll` did not wait either."""
    assert played.seen[rank]["moment"]["seen"] == [[0, True, 1], [0, True, 4]]


@pytest.mark.parametrize("step", [1, 4])
def test_what_is_saved_is_the_state_of_the_moment(played: Played, step: int) -> None:
    """Although two steps were done before it was written; the second save uses the memory of the first."""
    saved = played.folder / "moment" / "checkpoints" / f"step-{step:08d}"
    assert same_state(saved, played.folder / f"moment-then-{step}")
    assert not same_state(saved, played.folder / "moment-later")


@OF_BOTH_RANKS
def test_polling_publishes(played: Played, rank: int) -> None:
    """And stalls training no longer than the calls last."""
    found = played.seen[rank]["poll_alone"]
    assert found["polls"] > POLLS
    assert 0 < found["stalled_s"] <= found["in_calls_s"]
    assert found["stalled_s"] < found["seconds"]
    if rank == 0:
        assert found["log"][-1] == "rename checkpoints/latest"


@OF_BOTH_RANKS
def test_a_save_waits_for_the_one_before(played: Played, rank: int) -> None:
    found = played.seen[rank]["back_pressure"]
    assert found["steps"] == [None, 1, 2]
    assert found["stalled_s"] > SLOW_S
    of_second = [number for number, line in enumerate(found["log"]) if "step-00000002" in line]
    of_first = [number for number, line in enumerate(found["log"]) if "step-00000001" in line]
    assert max(of_first) < min(of_second)
    assert found["said"] == ["step 2: waiting for the checkpoint of step 1, still being written"]


@OF_BOTH_RANKS
def test_the_update_after_a_save_waits_for_the_copy(played: Played, rank: int) -> None:
    """And counts that as a stall."""
    saved = played.folder / "slow_copy"
    assert same_state(saved, Path(f"{saved}-then"))
    assert played.seen[rank]["slow_copy"]["stalled_s"] > SLOW_S


@OF_BOTH_RANKS
def test_a_copy_that_fails_keeps_nobody_waiting(played: Played, rank: int) -> None:
    found = played.seen[rank]["failing_copy"]
    assert "rank 1: RuntimeError: the device is gone" in found["said"]
    assert found["left"] == ["step-00000001", "step-00000001.tmp"]


@OF_BOTH_RANKS
def test_what_is_copied_is_not_left_before_that_is_done(played: Played, rank: int) -> None:
    assert played.seen[rank]["closing_early"]["opened"]


@OF_BOTH_RANKS
def test_a_ring_writes_the_same_files_and_training_waits_for_them(played: Played, rank: int) -> None:
    found = played.seen[rank]["ring"]
    assert found["in_begin"]
    assert found["stalled_s"] > SLOW_S
    by_ring, whole = found["files"]
    assert by_ring == whole  # name, size and SHA-256
    assert all(file.bytes > RING_BYTES for file in whole)
    held, ring = found["memory"]
    assert "a ring" not in held
    assert ring.startswith("a ring of 64.0 KiB")


@OF_BOTH_RANKS
def test_all_ranks_learn_that_a_ring_hangs(played: Played, rank: int) -> None:
    assert (
        f"rank 1: not written within checkpoint.timeout_s = {SLOW_S}"
        in played.seen[rank]["hanging_ring"]["said"]
    )


@OF_BOTH_RANKS
def test_offloaded_state_is_saved_and_loaded(played: Played, rank: int) -> None:
    found = played.seen[rank]["offloaded"]
    assert found["before"] == found["after"]


@OF_BOTH_RANKS
def test_a_full_disk_is_seen_before_anything_is_written(played: Played, rank: int) -> None:
    found = played.seen[rank]["no_room"]
    enough, refused = found["said"]
    assert not enough
    assert is_shown(refused, "checkpoint", played.folder / "no_room/checkpoints/step-00000002")
    assert "rank 0: " in refused
    assert f"{found['need']:,} bytes" in refused
    assert f"{found['need'] - 1:,}" in refused
    assert found["left"] == ["step-00000001"]


@OF_BOTH_RANKS
def test_two_writers_do_not_mix_in_one_folder(played: Played, rank: int) -> None:
    found = played.seen[rank]["occupied"]
    assert "rank 1: File exists" in found["said"]
    assert found["left"] == ["step-00000001", "step-00000002.tmp"]


@OF_BOTH_RANKS
def test_all_ranks_learn_that_a_writer_died(played: Played, rank: int) -> None:
    found = played.seen[rank]["dies"]
    assert "rank 1: MemoryError: no more" in found["said"]
    assert found["left"] == ["step-00000001", "step-00000002.tmp"]


@OF_BOTH_RANKS
def test_a_job_that_lost_its_run_neither_publishes_nor_begins(played: Played, rank: int) -> None:
    """Unfinished folders may be the other job's, and stay."""
    found = played.seen[rank]["taken_over"]
    while_held, *later = found["said"]
    assert not while_held
    assert all("rank 0: the run was taken over" in said for said in later)
    assert found["left"] == ["step-00000001", "step-00000002.tmp"]


@dataclass(frozen=True)
class Ended:
    run_dir: Path
    finished: Finished


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory, small: Small) -> dict[Run, Ended]:
    """All runs at once: they wait more than they compute."""
    folder = tmp_path_factory.mktemp("runs")
    calls = {run: Call(exit_codes_of, 2, train, run, words(small, folder, run)) for run in RUNS}
    return {
        run: Ended(folder / run.name, Finished(call.result(), call.output)) for run, call in calls.items()
    }


def words(small: Small, folder: Path, run: Run) -> list[str]:
    settings = [f"train.steps={STEPS}", "checkpoint.interval=3", "eval.interval=0"]
    limit = [f"checkpoint.timeout_s={TIMEOUT_S}"] if run.fault == "hang" else []
    return ["train", "--config", "tiny", *small.overrides(folder / run.name), *settings, *limit]


@pytest.mark.wait
@pytest.mark.xdist_group("saver_runs")
def test_a_run_waits_for_its_last_save(ended: dict[Run, Ended]) -> None:
    (slow,) = (found for run, found in ended.items() if run.fault == "slow")
    assert slow.finished.exit_codes == [0, 0], slow.finished.output
    assert checkpoints(slow.run_dir) == [SECOND, LAST]
    CheckpointReader(find_checkpoint(slow.run_dir)).check_content()


@pytest.mark.wait
@pytest.mark.xdist_group("saver_runs")
def test_a_run_saves_the_state_of_its_step_however_late_that_is_copied(ended: dict[Run, Ended]) -> None:
    usual, late = (
        next(found for run, found in ended.items() if run.fault == fault) for fault in ("slow", "late")
    )
    assert late.finished.exit_codes == [0, 0], late.finished.output
    saved = (found.run_dir / "checkpoints" / SECOND for found in (usual, late))
    assert same_state(*saved)


@pytest.mark.wait
@pytest.mark.xdist_group("saver_runs")
@pytest.mark.parametrize(
    "run", [run for run in RUNS if run.fault not in ("slow", "late")], ids=lambda run: run.name
)
def test_a_save_that_fails_or_hangs_ends_the_run(ended: dict[Run, Ended], run: Run) -> None:
    """All ranks, with exit code 73, the reason, and the old checkpoint as it was."""
    run_dir, finished = ended[run].run_dir, ended[run].finished
    assert finished.exit_codes == [73, 73], finished.output
    hung = f"checkpoint.timeout_s = {float(TIMEOUT_S)}"
    reason = hung if run.fault == "hang" else "Input/output error"
    assert any(f"rank {run.rank}: " in line and reason in line for line in finished.lines), finished.output
    assert find_checkpoint(run_dir).name == FIRST
    reader = CheckpointReader(find_checkpoint(run_dir))
    reader.check_content()
    assert reader.state.step == 3
    assert metrics(run_dir)[-1]["step"] >= 6
