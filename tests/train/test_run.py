"""Training as a user meets it: launchers, real signals, real files.

Each case is stopped by a signal, resumed by the same command, and compared with a run that was left alone.
"""

import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.support.models import Small
from tests.support.product import (
    PLAIN_TORCHRUN,
    TORCHRUN,
    Finished,
    Job,
    checkpoints,
    finish,
    left_over,
    metrics,
    numbers,
    start,
    tensor_bytes,
    train,
)
from tests.support.world import TIMEOUT_S
from tests.train.attempts import first_steps, wait_for_steps

pytestmark = pytest.mark.process

STEPS, EVALUATED = 30, [12, 24, 30]
EVERY_STEP = {
    *("step", "loss", "grad_norm", "lr", "tokens", "tokens_per_s", "step_time_s", "memory_bytes", "windows"),
    *("device", "attention", "kernels", "attempt"),
}


@dataclass(frozen=True)
class Case:
    name: str
    settings: list[str]
    signal: signal.Signals
    launcher: tuple[str, ...] = ()
    """It gets the signal; without one, ranks are forked."""
    asked: Sequence[int] = ()
    """Forked ranks that get the signal."""
    exit_code: int = 75


DP = "parallel.tp=1"
CASES = [
    Case("zero1-tp2-sp", ["zero.stage=1"], signal.SIGTERM, TORCHRUN),
    # Plain torchrun passes SIGTERM on and then raises: the run is saved, the exit code is lost.
    Case("zero2", ["zero.stage=2", DP], signal.SIGTERM, PLAIN_TORCHRUN, exit_code=1),
    Case("zero3", ["zero.stage=3", DP], signal.SIGUSR1, asked=[1]),
    # from the keyboard, to all
    Case("zero1-fp32", ["train.precision=fp32", DP], signal.SIGINT, asked=[0, 1]),
]


@dataclass(frozen=True)
class Stopped:
    """A run that was stopped and resumed, and the same run without interruption."""

    stopped: Finished
    resumed: Finished
    stopped_at: int
    saved: list[str]
    """Checkpoints between stop and resume."""
    left_over: Sequence[object]
    """Processes after either."""
    exit_code: int
    """To be expected of the first."""
    run_dir: Path
    whole: Path


@pytest.fixture(
    scope="module",
    params=[pytest.param(case, id=case.name, marks=pytest.mark.xdist_group(case.name)) for case in CASES],
)
def run(
    request: pytest.FixtureRequest,
    small: Small,
    uninterrupted: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Stopped:
    case: Case = request.param
    run_dir = tmp_path_factory.mktemp(case.name)
    overrides = [*small.overrides(run_dir), *case.settings]
    stop = stop_launched if case.launcher else stop_forked
    stopped, left = stop(case, overrides, run_dir)
    stopped_at, saved = len(metrics(run_dir)), checkpoints(run_dir)
    if case.launcher:
        resumed = finish(start(overrides, ranks=2, launcher=case.launcher))
    else:
        resumed = train(overrides, ranks=2)
    left = [*left, *left_over(run_dir)]
    whole = uninterrupted(case.settings)
    return Stopped(stopped, resumed, stopped_at, saved, left, case.exit_code, run_dir, whole)


def stop_launched(case: Case, overrides: list[str], run_dir: Path) -> tuple[Finished, Sequence[object]]:
    process = start(overrides, ranks=2, launcher=case.launcher)
    wait_for_steps(run_dir, 1, lambda: process.poll() is None)
    process.send_signal(case.signal)
    return finish(process), left_over(run_dir)


def stop_forked(case: Case, overrides: list[str], run_dir: Path) -> tuple[Finished, Sequence[object]]:
    """A signal that a launcher would pass on to the supervisors that it has started."""
    job = Job(("train", "--config", "tiny", *overrides), ranks=2)
    wait_for_steps(run_dir, 1, job.is_alive)
    ranks = job.ranks()
    processes = [*ranks, *(child for rank in ranks for child in rank.children())]
    for rank in case.asked:
        ranks[rank].send_signal(case.signal)
    _, left = psutil.wait_procs(processes, TIMEOUT_S)
    return job.finish(), left


def test_a_signal_saves_on_all_ranks_and_the_exit_code_says_so(run: Stopped) -> None:
    assert run.stopped.exit_code == run.exit_code, run.stopped.output
    assert 0 < run.stopped_at < STEPS
    assert run.saved[-1] == f"step-{run.stopped_at:08d}"


def test_the_same_command_resumes_to_the_end(run: Stopped) -> None:
    assert run.resumed.exit_code == 0, run.resumed.output
    assert first_steps(run.run_dir) == [1, run.stopped_at + 1]


def test_every_step_is_reported_once_with_the_promised_keys(run: Stopped) -> None:
    rows = metrics(run.run_dir)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert all(set(row) - {"valid_loss", "valid"} == EVERY_STEP for row in rows)
    assert {(row["device"], row["attention"], row["kernels"]) for row in rows} == {("cpu", "flash", "plain")}
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


def test_validation_data_is_evaluated_at_the_interval_and_at_the_end(run: Stopped) -> None:
    evaluated = [row["step"] for row in metrics(run.run_dir) if "valid_loss" in row]
    assert evaluated == EVALUATED


def test_the_last_evaluation_reads_the_whole_validation_set(run: Stopped) -> None:
    valid = [row["valid"]["train"] for row in metrics(run.run_dir) if "valid" in row]
    there = valid[-1]["of_windows"]
    assert valid[-1]["windows"] == there
    assert valid[-1]["tokens"] > valid[0]["tokens"]
    assert {found["windows"] for found in valid[:-1]} == {2 * 8}  # eval.batches of the global batch


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
        assert number < 10, finished.output


def test_no_process_is_left_over(run: Stopped) -> None:
    assert list(run.left_over) == []


def test_a_finished_run_is_left_as_it_is(small: Small, tmp_path: Path) -> None:
    overrides = [*small.overrides(tmp_path), DP, "train.steps=2", "optim.warmup_steps=0"]
    files = []
    for _ in range(2):
        done = train(overrides, ranks=2)
        assert done.exit_codes == [0, 0], done.output
        files.append({path: path.stat().st_mtime_ns for path in tmp_path.glob("checkpoints/step-*/*")})
    assert first_steps(tmp_path) == [1, 0]
    assert files[0] == files[1] != {}
    assert [row["step"] for row in metrics(tmp_path)] == [1, 2]
