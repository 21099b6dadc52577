"""metrics.jsonl stays true: where a job is stopped, loses its run to another and is continued, which changes
nothing and ends; where the power fails; where lines are there twice."""

import json
import os
import shutil
import signal
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from llama_mcore.checkpoint import durable_io
from llama_mcore.train.health import Judgement
from llama_mcore.train.trainer import Trainer
from tests.support.models import Small
from tests.support.product import Finished, llama_mcore, metrics, run_command, train
from tests.support.world import Call, exit_codes_of

pytestmark = pytest.mark.process

STEPS = 30
SAVED = 6
SETTINGS = ["parallel.tp=1", f"checkpoint.interval={SAVED}", "checkpoint.asynchronous=false"]


@dataclass(frozen=True)
class TakenOver:
    run_dir: Path
    overrides: list[str]
    first: Finished
    """It was stopped, on rank 0, after its first save, and continued when the second was at its end."""
    second: Finished
    before: dict[str, bytes]
    """Files when the first was continued."""


@pytest.fixture(scope="module")
def run(small: Small, tmp_path_factory: pytest.TempPathFactory) -> TakenOver:
    run_dir = tmp_path_factory.mktemp("taken-over") / "run"
    overrides = [*small.overrides(run_dir), *SETTINGS]
    job = Call(exit_codes_of, 2, train_and_be_stopped, ["train", "--config", "tiny", *overrides])
    while not (stopped := [one for one in processes(job) if one.status() == psutil.STATUS_STOPPED]):
        assert job.is_alive(), job.output
        time.sleep(0.02)
    # As a host does that cannot see it: this one sees that it attempts.
    (run_dir / "lease/00000002.released.json").write_text("{}")
    second = train(overrides)
    before = files(run_dir)
    stopped[0].send_signal(signal.SIGCONT)
    return TakenOver(run_dir, overrides, Finished(job.result(), job.output), second, before)


def train_and_be_stopped(words: list[str]) -> None:
    """The lines are then those that the checkpoint has, and whoever goes on from it leaves the file as it is:
    a late line would come into the same."""
    step = Trainer.step

    def step_or_stop(trainer: Trainer) -> Judgement:
        if trainer.sinks and trainer.state.step == SAVED:
            os.kill(os.getpid(), signal.SIGSTOP)
        return step(trainer)

    Trainer.step = step_or_stop  # type: ignore[method-assign]
    run_command(words)


def processes(job: Call) -> list[psutil.Process]:
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(job.pid).children(recursive=True)
    return []


def files(run_dir: Path) -> dict[str, bytes]:
    """Without the lease, which is given back, and TensorBoard's, whose writer holds lines back."""
    paths = {str(path.relative_to(run_dir)): path for path in run_dir.rglob("*") if path.is_file()}
    left_out = ("lease", "tensorboard")
    return {name: path.read_bytes() for name, path in paths.items() if not name.startswith(left_out)}


def test_every_rank_of_the_first_ends_as_the_manual_says(run: TakenOver) -> None:
    assert run.second.exit_code == 0, run.second.output
    assert run.first.exit_codes == [73, 73], run.first.output
    assert "the run was taken over by process" in run.first.output
    assert "Traceback" not in run.first.output


def test_the_first_changes_nothing_once_it_has_lost_the_run(run: TakenOver) -> None:
    now = files(run.run_dir)
    assert [name for name in sorted({*now, *run.before}) if now.get(name) != run.before.get(name)] == []


def test_every_step_is_there_once_and_says_of_which_attempt(run: TakenOver) -> None:
    rows = metrics(run.run_dir)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    attempts = [row["attempt"] for row in rows]
    assert attempts == [1] * SAVED + [3] * (STEPS - SAVED)
    events = EventAccumulator(str(run.run_dir / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, STEPS + 1))


def test_its_audit_passes(run: TakenOver) -> None:
    audited = llama_mcore("audit-data", run.run_dir)
    assert audited.exit_code == 0, audited.output
    assert f"{STEPS} lines" in audited.output


def lines_of(run_dir: Path) -> list[str]:
    return (run_dir / "metrics.jsonl").read_text().splitlines(keepends=True)


def test_lines_that_a_power_cut_took_are_missed(run: TakenOver, tmp_path: Path) -> None:
    run_dir = Path(shutil.copytree(run.run_dir, tmp_path / "run"))
    (run_dir / "metrics.jsonl").write_text("".join(lines_of(run_dir)[:-7]))
    went_on = train([*run.overrides, f"run.dir={run_dir}", f"train.steps={STEPS + 1}"])
    assert went_on.exit_code == 0, went_on.output
    (warning,) = [line for line in went_on.lines if "LACKS" in line]
    assert "steps 24 to 30" in warning
    audited = llama_mcore("audit-data", run_dir)
    assert audited.exit_code == 65, audited.output
    assert "steps = 24 to 30: " in audited.output


def note_what_reaches_the_disk(log: Path, words: list[str]) -> None:
    """A command that notes each fsync of metrics.jsonl, with the lines on the disk from then on, and each
    rename of a save."""
    fsync = os.fsync

    def note(*words: object) -> None:
        with log.open("a") as file:
            print(*words, file=file)

    def noted_fsync(descriptor: int) -> None:
        fsync(descriptor)
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        if path.name == "metrics.jsonl":
            note("lines", len(path.read_bytes().splitlines()))

    os.fsync = noted_fsync
    durable_io.observer = lambda operation, path: note(operation, path.name)
    run_command(words)


def test_lines_are_on_the_disk_before_the_checkpoint_that_counts_on_them(
    small: Small, tmp_path: Path
) -> None:
    settings = [*small.overrides(tmp_path / "run"), *SETTINGS, "train.steps=13", "observe.tensorboard=false"]
    words = ["train", "--config", "tiny", *settings]
    assert exit_codes_of(1, note_what_reaches_the_disk, tmp_path / "log", words) == [0]
    lines, published = 0, []
    for noted in (tmp_path / "log").read_text().splitlines():
        operation, _, what = noted.partition(" ")
        if operation == "lines":
            lines = int(what)
        elif operation == "rename" and what in {f"step-{step:08d}" for step in (6, 12, 13)}:
            published.append(what)
            assert lines >= int(what.removeprefix("step-"))
    assert len(published) == 3


def test_repeated_lines_fail_the_audit_until_the_run_is_started_again(run: TakenOver, tmp_path: Path) -> None:
    """Repeated lines, as an earlier version wrote them, which did not check the lease."""
    run_dir = Path(shutil.copytree(run.run_dir, tmp_path / "run"))
    sound = lines_of(run_dir)
    late = [json.dumps(json.loads(line) | {"attempt": 1}) + "\n" for line in sound[9:12]]
    (run_dir / "metrics.jsonl").write_text("".join([*sound[:20], *late, *sound[20:]]))
    audited = llama_mcore("audit-data", run_dir)
    assert audited.exit_code == 65, audited.output
    assert "steps = 10 to 12: " in audited.output
    assert train([*run.overrides, f"run.dir={run_dir}"]).exit_code == 0
    assert lines_of(run_dir) == sound
    assert llama_mcore("audit-data", run_dir).exit_code == 0


def test_pipes_in_the_way_of_what_a_run_can_do_without(small: Small, tmp_path: Path) -> None:
    for name in ("timeline.jsonl", "attempts.jsonl", "metrics-abandoned.jsonl"):
        os.mkfifo(tmp_path / name)
    done = train([*small.overrides(tmp_path), "parallel.tp=1", "train.steps=2", "optim.warmup_steps=1"])
    assert done.exit_code == 0, done.output
    assert "timeline.jsonl cannot be written (it is not a regular file)" in done.output
    assert len(metrics(tmp_path)) == 2
