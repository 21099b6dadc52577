"""Training as a user meets it: real launchers, real signals, real files.

Each case is stopped by a signal, resumed by the same command, and compared with a run that was left alone.
"""

import json
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.conftest import Small
from tests.forked import run_worker
from tests.train.product import (
    LLAMA_MCORE,
    PLAIN_TORCHRUN,
    Finished,
    checkpoints,
    left_over,
    metrics,
    signal_launcher,
    signal_one_worker,
    stop_after_a_step,
    tensor_bytes,
    train,
)

WORKER = Path(__file__).with_name("uninterrupted.py")
STEPS, EVALUATED = 30, [12, 24, 30]
EVERY_STEP = {
    *("step", "loss", "grad_norm", "lr", "tokens", "tokens_per_s", "step_time_s", "memory_bytes", "windows")
}


@dataclass(frozen=True)
class Case:
    name: str
    settings: list[str]
    stop: Callable[[psutil.Process], None]
    launcher: tuple[str, ...] = LLAMA_MCORE
    exit_code: int = 75

    def overrides(self, small: Small, run_dir: Path) -> list[str]:
        return small.overrides(run_dir) + self.settings


DP = "parallel.tp=1"
CASES = [
    Case("zero1-tp2-sp", ["zero.stage=1"], signal_launcher(signal.SIGTERM)),
    # Plain torchrun passes SIGTERM on and then raises: the run is saved, the exit code is lost.
    Case("zero2", ["zero.stage=2", DP], signal_launcher(signal.SIGTERM), PLAIN_TORCHRUN, exit_code=1),
    Case("zero3", ["zero.stage=3", DP], signal_one_worker(signal.SIGUSR1)),
    Case("zero1-fp32", ["train.precision=fp32", DP], signal_launcher(signal.SIGINT)),
]
REPEATED = [*CASES, CASES[-1]]  # the last one is started again when it has finished


@dataclass(frozen=True)
class Stopped:
    """A run that was stopped and resumed, and the same run without interruption."""

    case: Case
    stopped: Finished
    resumed: Finished
    stopped_at: int
    saved: list[str]
    """Checkpoints between stop and resume."""
    run_dir: Path
    whole: Path


@pytest.fixture(scope="module")
def uninterrupted(small: Small, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with an uninterrupted run of each case."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    todo = [case.overrides(small, folder / case.name) for case in REPEATED]
    (folder / "cases.json").write_text(json.dumps(todo))
    run_worker(WORKER, folder / "cases.json")
    return folder


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def run(
    request: pytest.FixtureRequest,
    small: Small,
    uninterrupted: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Stopped:
    case = request.param
    run_dir = tmp_path_factory.mktemp(case.name)
    overrides = case.overrides(small, run_dir)
    stopped = stop_after_a_step(overrides, run_dir, case.stop, case.launcher)
    stopped_at, saved = len(metrics(run_dir)), checkpoints(run_dir)
    resumed = train(overrides, ranks=2, launcher=case.launcher)
    return Stopped(case, stopped, resumed, stopped_at, saved, run_dir, uninterrupted / case.name)


def test_a_signal_saves_on_all_ranks_and_the_exit_code_says_so(run: Stopped) -> None:
    assert run.stopped.exit_code == run.case.exit_code, "\n".join(run.stopped.lines)
    assert 0 < run.stopped_at < STEPS
    assert run.saved[-1] == f"step-{run.stopped_at:08d}"
    assert f"stopped at step {run.stopped_at} of {STEPS}" in "\n".join(run.stopped.lines)


def test_the_same_command_resumes_to_the_end(run: Stopped) -> None:
    assert run.resumed.exit_code == 0, "\n".join(run.resumed.lines)
    assert f"resuming at step {run.stopped_at} " in "\n".join(run.resumed.lines)


def test_every_step_is_reported_once_with_the_promised_keys(run: Stopped) -> None:
    rows = metrics(run.run_dir)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert all(set(row) - {"valid_loss", "valid"} == EVERY_STEP for row in rows)
    assert [row["tokens"] for row in rows] == [256 * step for step in range(1, STEPS + 1)]


def test_losses_and_norms_equal_those_of_an_uninterrupted_run(run: Stopped) -> None:
    assert numbers(run.run_dir) == numbers(run.whole)


def test_the_last_checkpoint_equals_that_of_an_uninterrupted_run(run: Stopped) -> None:
    last = f"checkpoints/step-{STEPS:08d}"
    files = sorted(path.name for path in (run.whole / last).glob("*.safetensors"))
    assert len(files) == 2
    for name in files:
        assert tensor_bytes(run.run_dir / last / name) == tensor_bytes(run.whole / last / name)


def test_training_learns(run: Stopped) -> None:
    losses = [row["loss"] for row in metrics(run.run_dir)]
    assert losses[0] > 5.3  # ln(256) = 5.55
    assert losses[-1] < losses[0] - 1


def test_held_out_data_is_evaluated_at_the_interval_and_at_the_end(run: Stopped) -> None:
    evaluated = [row["step"] for row in metrics(run.run_dir) if "valid_loss" in row]
    assert evaluated == EVALUATED


def test_only_the_newest_checkpoints_stay_and_nothing_half_written(run: Stopped) -> None:
    assert checkpoints(run.run_dir) == ["step-00000024", "step-00000030"]
    assert len(run.saved) <= 2
    assert not [*run.run_dir.rglob("*.tmp")]


def test_tensorboard_holds_every_step_once(run: Stopped) -> None:
    events = EventAccumulator(str(run.run_dir / "tensorboard")).Reload()
    steps = [event.step for event in events.Scalars("train/loss")]
    assert steps == list(range(1, STEPS + 1))
    assert [event.step for event in events.Scalars("valid/loss")] == EVALUATED


def test_two_ranks_are_quiet_before_the_first_step(run: Stopped) -> None:
    """Fewer than 10 lines on stdout and stderr together, at the first start and at a resume."""
    for finished, first in ((run.stopped, 1), (run.resumed, run.stopped_at + 1)):
        number = next(n for n, line in enumerate(finished.lines) if line.startswith(f"step {first}/"))
        assert number < 10, "\n".join(finished.lines)


def test_no_process_is_left_over(run: Stopped) -> None:
    assert left_over(run.run_dir) == []


def test_a_finished_run_is_left_as_it_is(uninterrupted: Path) -> None:
    finished = uninterrupted / REPEATED[-1].name
    started_again = (finished / "config.yaml").stat().st_mtime
    assert (finished / f"checkpoints/step-{STEPS:08d}").stat().st_mtime < started_again
    assert len(metrics(finished)) == STEPS


def numbers(run_dir: Path) -> list[tuple]:
    """What a run computed, without how fast it was."""
    return [
        (row["step"], row["loss"], row["grad_norm"], row["lr"], row["tokens"], row.get("valid"))
        for row in metrics(run_dir)
    ]
