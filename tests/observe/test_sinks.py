"""llama_mcore.observe.sinks: metrics.jsonl, TensorBoard events and what the terminal shows."""

import io
import json
import os
import resource
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from llama_mcore.errors import OutputError
from llama_mcore.observe.config import ObserveConfig
from llama_mcore.observe.line_file import json_line
from llama_mcore.observe.metrics import StepReport, ValidationLoss
from llama_mcore.observe.metrics_file import ABANDONED_METRICS, METRICS_FILE, drop_steps_after
from llama_mcore.observe.sinks import TENSORBOARD_DIR, MetricSinks
from tests.observe.held import Held
from tests.support.errors import refused

QUIET = ObserveConfig(log_interval=10, tensorboard=False)
LEASE = Held()


def report(
    step: int, loss: float = 2.0, valid_loss: float | None = None, skipped: bool = False
) -> StepReport:
    valid = {} if valid_loss is None else {"code": ValidationLoss(valid_loss, 10)}
    new = {"windows": {"code": 3 * step}, "valid": valid, "skipped": skipped}
    return StepReport(step, loss, 0.5, 1e-3, step * 100, 1000.0, 2.0, 4096, **new)


def write(
    run_dir: Path,
    reports: Sequence[StepReport],
    start_step: int = 0,
    config: ObserveConfig = QUIET,
    terminal: bool = False,
    width: int = 100,
    lease: Held = LEASE,
    continues: Path | None = None,
) -> str:
    """Output for a person of a run of 40 steps that reports `reports`."""
    screen = io.StringIO()
    console = Console(
        file=screen,
        force_terminal=terminal,
        force_interactive=terminal,
        width=width,
        color_system=None,
        soft_wrap=True,
    )
    with MetricSinks(config, run_dir, 40, start_step, lease, continues, console) as sinks:
        for one in reports:
            sinks.write(one)
    return screen.getvalue()


def rows(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / METRICS_FILE).read_bytes().splitlines()]


def test_every_step_is_a_line(tmp_path: Path) -> None:
    write(tmp_path / "new" / "run", [report(1), report(2, valid_loss=2.5)])
    first, second = rows(tmp_path / "new" / "run")
    assert list(first) == [
        "step",
        "loss",
        "grad_norm",
        "lr",
        "tokens",
        "tokens_per_s",
        "step_time_s",
        "memory_bytes",
        "device",
        "attention",
        "kernels",
        "windows",
        "attempt",
    ]
    assert second["valid_loss"] == 2.5


def test_mfu_is_on_the_line_of_a_terminal_where_it_is_known(tmp_path: Path) -> None:
    known = replace(report(1), mfu_causal=0.485, mfu_full=0.495)
    assert "MFU 48.5% causal 49.5% full" in write(tmp_path, [known], terminal=True)
    assert "MFU" not in write(tmp_path, [report(1)], terminal=True)


def test_a_line_is_on_disk_before_the_next_step(tmp_path: Path) -> None:
    with MetricSinks(QUIET, tmp_path, 40, 0, LEASE, console=Console(file=io.StringIO())) as sinks:
        sinks.write(report(1))
        assert [row["step"] for row in rows(tmp_path)] == [1]


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), float("-inf")])
def test_a_loss_that_is_not_finite_is_null_in_the_file_and_visible_on_the_screen(
    tmp_path: Path, loss: float
) -> None:
    screen = write(tmp_path, [report(1, loss=loss)])
    assert rows(tmp_path)[0]["loss"] is None
    assert f"loss {loss:.4f}" in screen


def test_no_step_appears_twice_after_a_resume(tmp_path: Path) -> None:
    write(tmp_path, [report(step, loss=1.0) for step in range(1, 8)])
    write(tmp_path, [report(step, loss=9.0) for step in range(6, 9)], start_step=5)
    assert [(row["step"], row["loss"]) for row in rows(tmp_path)] == [
        *[(step, 1.0) for step in range(1, 6)],
        *[(step, 9.0) for step in range(6, 9)],
    ]


def test_abandoned_steps_move_to_their_own_file(tmp_path: Path) -> None:
    with MetricSinks(ObserveConfig(), tmp_path, 40, 0, LEASE, console=Console(file=io.StringIO())) as sinks:
        for step in (1, 2, 3, 4):
            sinks.write(report(step))
        sinks.go_back(2)
        for step in (3, 4, 5):
            sinks.write(report(step, loss=1.0))
        sinks.go_back(4)
    assert [(row["step"], row["loss"]) for row in rows(tmp_path)] == [(1, 2.0), (2, 2.0), (3, 1.0), (4, 1.0)]
    abandoned = (tmp_path / ABANDONED_METRICS).read_bytes().splitlines()
    assert [(row["step"], row["loss"]) for row in map(json.loads, abandoned)] == [
        (3, 2.0),
        (4, 2.0),
        (5, 1.0),
    ]
    events = EventAccumulator(str(tmp_path / TENSORBOARD_DIR)).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4]


def test_who_lost_the_run_adds_nothing(tmp_path: Path) -> None:
    lease = Held()
    with MetricSinks(ObserveConfig(), tmp_path, 40, 0, lease, console=Console(file=io.StringIO())) as sinks:
        for step in (1, 2):
            sinks.write(report(step))
        lease.is_lost = True
        actions = [lambda: sinks.write(report(3)), sinks.check, lambda: sinks.go_back(1)]
        for action in actions:
            with refused(OutputError, "run.dir", tmp_path) as caught:
                action()
            assert "taken over by another job" in str(caught.value)
    assert [row["step"] for row in rows(tmp_path)] == [step for step, _ in losses(tmp_path)] == [1, 2]
    assert not (tmp_path / ABANDONED_METRICS).exists()


def test_who_lost_the_run_before_the_first_step_drops_nothing(tmp_path: Path) -> None:
    """The lines are those of the job that holds it now."""
    write(tmp_path, [report(1), report(2)])
    before = (tmp_path / METRICS_FILE).read_bytes()
    with refused(OutputError, "run.dir", tmp_path):
        write(tmp_path, [], lease=Held(is_lost=True))
    assert (tmp_path / METRICS_FILE).read_bytes() == before


def test_a_resume_drops_what_an_attempt_added_that_had_lost_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, [report(step) for step in range(1, 5)])
    write(tmp_path, [report(step, loss=3.0) for step in range(4, 8)], start_step=3, lease=Held(2))
    with (tmp_path / METRICS_FILE).open("ab") as file:  # of the first: a repeated step and one that was not
        for step in (5, 9):
            file.write(json_line(report(step).to_dict() | {"attempt": 1}))
    assert "DROPPED" not in caplog.text
    write(tmp_path, [report(step, loss=4.0) for step in (10, 11)], start_step=9, lease=Held(3))
    assert "DROPPED 2 lines of steps 5, 9," in caplog.text
    assert "LACKS steps 8 to 9:" in caplog.text
    assert [(row["step"], row["attempt"]) for row in rows(tmp_path)] == [
        *[(step, 1) for step in (1, 2, 3)],
        *[(step, 2) for step in (4, 5, 6, 7)],
        *[(step, 3) for step in (10, 11)],
    ]


@pytest.mark.parametrize(
    ("there", "start", "said"),
    [(range(1, 6), 5, ""), (range(1, 6), 12, "6 to 12"), ([1, 2, 5, 7], 7, "3 to 4, 6"), ([], 0, "")],
)
def test_a_resume_says_which_steps_are_lost(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, there: Sequence[int], start: int, said: str
) -> None:
    write(tmp_path, [report(step) for step in there])
    write(tmp_path, [report(start + 1)], start_step=start, lease=Held(2))
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == (said != "")
    assert all(f"LACKS steps {said}:" in warning for warning in warnings)


def test_steps_that_another_folder_has_are_not_lost(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoint = Path("/runs/a/checkpoints/step-00000007")
    write(tmp_path, [report(8), report(9)], start_step=7, continues=checkpoint)
    assert [row.get("continues") for row in rows(tmp_path)] == [str(checkpoint), None]
    write(tmp_path, [report(10)], start_step=9, lease=Held(2))
    assert "LACKS" not in caplog.text


def test_lines_are_on_the_disk_when_they_have_to_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Content, and the file's name, which may be new."""
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_ino))
    with MetricSinks(QUIET, tmp_path, 40, 0, LEASE, console=Console(file=io.StringIO())) as sinks:
        assert synced == [tmp_path.stat().st_ino]
        sinks.write(report(1))
        sinks.sync()
        assert synced[1:] == [(tmp_path / METRICS_FILE).stat().st_ino]
        sinks.go_back(0)
    assert synced[2] == (tmp_path / ABANDONED_METRICS).stat().st_ino


@pytest.mark.parametrize("name", [METRICS_FILE, ABANDONED_METRICS, f"{METRICS_FILE}.tmp"])
def test_a_pipe_in_the_way_is_not_waited_for(tmp_path: Path, name: str) -> None:
    with MetricSinks(QUIET, tmp_path, 40, 0, LEASE, console=Console(file=io.StringIO())) as sinks:
        sinks.write(report(1))
        (tmp_path / name).unlink(missing_ok=True)
        os.mkfifo(tmp_path / name)
        if name.endswith(".tmp"):
            sinks.go_back(0)
            assert rows(tmp_path) == []
        else:
            with refused(OutputError, "run.dir", tmp_path):
                sinks.go_back(0)


def test_plain_output_shows_decisions(tmp_path: Path) -> None:
    decided = replace(report(3), decision="roll back: too bad")
    assert "step 3/40 (7%)  " in write(tmp_path, [report(1), report(2), decided])
    assert rows(tmp_path)[-1]["decision"] == "roll back: too bad"
    assert "decision" not in rows(tmp_path)[0]


def test_a_run_that_starts_anew_begins_an_empty_file(tmp_path: Path) -> None:
    write(tmp_path, [report(1), report(2)])
    write(tmp_path, [report(1, loss=7.0)])
    assert [row["loss"] for row in rows(tmp_path)] == [7.0]


@given(steps=st.integers(0, 6), start=st.integers(0, 6), cut=st.integers(0, 400))
def test_a_file_cut_anywhere_keeps_its_whole_lines(
    tmp_path_factory: pytest.TempPathFactory, steps: int, start: int, cut: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "cut.jsonl"
    lines = [json_line(report(step).to_dict())[:-1] for step in range(1, steps + 1)]
    content = b"".join(line + b"\n" for line in lines)[:cut]
    path.write_bytes(content)
    drop_steps_after(path, start)
    whole = content.count(b"\n")  # what has no end was being written
    kept = lines[: min(whole, start)]
    assert path.read_bytes() == b"".join(line + b"\n" for line in kept)


def test_the_file_is_replaced_in_one_move(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, [report(1), report(2)])
    before = (tmp_path / METRICS_FILE).read_bytes()

    def power_cut(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", power_cut)
    with pytest.raises(KeyboardInterrupt):
        drop_steps_after(tmp_path / METRICS_FILE, 1)
    assert (tmp_path / METRICS_FILE).read_bytes() == before


def test_a_file_with_nothing_to_drop_is_left_alone(tmp_path: Path) -> None:
    write(tmp_path, [report(1)])
    before = (tmp_path / METRICS_FILE).stat()
    drop_steps_after(tmp_path / METRICS_FILE, 1)
    assert (tmp_path / METRICS_FILE).stat().st_ino == before.st_ino


def losses(run_dir: Path, tag: str = "train/loss") -> list[tuple[int, float]]:
    events = EventAccumulator(str(run_dir / TENSORBOARD_DIR))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_tensorboard_has_every_step_once_after_a_resume(tmp_path: Path) -> None:
    config = ObserveConfig(tensorboard=True)
    write(tmp_path, [report(step, loss=1.0) for step in range(1, 5)], config=config)
    write(tmp_path, [report(3, loss=9.0, valid_loss=4.0)], start_step=2, config=config)
    assert losses(tmp_path) == [(1, 1.0), (2, 1.0), (3, 9.0)]
    assert losses(tmp_path, "valid/loss") == losses(tmp_path, "valid_loss/code") == [(3, 4.0)]
    assert losses(tmp_path, "data/code_windows") == [(1, 3.0), (2, 6.0), (3, 9.0)]


def test_tensorboard_can_be_switched_off(tmp_path: Path) -> None:
    write(tmp_path, [report(1)])
    assert not (tmp_path / TENSORBOARD_DIR).exists()


def test_plain_output_is_a_rare_line(tmp_path: Path) -> None:
    lines = write(tmp_path, [report(step) for step in range(1, 41)]).splitlines()
    assert [line.split()[1] for line in lines] == ["1/40", "10/40", "20/40", "30/40", "40/40"]
    assert "(25%)" in lines[1]
    assert lines[1].endswith("ETA 1m00s")  # 30 steps of 2 s


def test_plain_output_shows_the_first_step_after_a_resume(tmp_path: Path) -> None:
    lines = write(tmp_path, [report(13), report(14)], start_step=12).splitlines()
    assert [line.split()[1] for line in lines] == ["13/40"]


def test_plain_output_shows_evaluations_and_skipped_updates(tmp_path: Path) -> None:
    screen = write(tmp_path, [report(1), report(2), report(3, valid_loss=2.25), report(4, skipped=True)])
    assert [line.split()[1] for line in screen.splitlines()] == ["1/40", "3/40", "4/40"]
    assert "validation loss 2.2500" in screen
    assert "update skipped" in screen


def test_one_slow_step_does_not_move_the_eta(tmp_path: Path) -> None:
    slow = StepReport(10, 2.0, 0.5, 1e-3, 1000, 1.0, 500.0, 4096)
    screen = write(tmp_path, [*[report(step) for step in range(1, 10)], slow])
    assert screen.splitlines()[-1].endswith("ETA 1m00s")


def test_a_terminal_gets_a_progress_line_and_lasting_evaluations(tmp_path: Path) -> None:
    screen = write(tmp_path, [report(1), report(2, valid_loss=2.25), report(3)], terminal=True)
    assert "3/40" in screen
    assert "ETA 1m14s" in screen  # 37 steps of 2 s
    assert "step 2  loss 2.0000" in screen
    assert "validation loss 2.2500" in screen


def test_a_terminal_of_80_columns_shows_the_eta(tmp_path: Path) -> None:
    long = replace(report(1), loss=12.345, tokens_per_s=1_234_567.0, mfu_causal=0.485, mfu_full=0.495)
    assert "ETA 1m18s" in write(tmp_path, [long], terminal=True, width=80)  # 39 steps of 2 s


def test_an_unwritable_run_folder_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file where the folder should be")
    with refused(OutputError, "run.dir", tmp_path / "run"):
        write(tmp_path / "run", [])


def test_a_full_disk_is_one_clear_error_and_the_next_run_goes_on(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, hard))  # bytes; the kernel then fails a write half-way
    try:
        with refused(OutputError, "run.dir", tmp_path):
            write(tmp_path, [report(step) for step in range(1, 30)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / METRICS_FILE).stat().st_size == 500
    write(tmp_path, [report(3)], start_step=2)
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3]


def test_a_console_that_takes_nothing_ends_no_run(tmp_path: Path) -> None:
    """The job's output may go to a full disk."""
    full = io.TextIOWrapper(io.FileIO("/dev/full", "w"), write_through=True)
    console = Console(file=full, width=100)
    with MetricSinks(QUIET, tmp_path, 40, 0, LEASE, console=console) as sinks:
        for step in range(1, 21):
            sinks.write(report(step))
    assert len((tmp_path / METRICS_FILE).read_bytes().splitlines()) == 20
    full.detach()  # closing it would write what it still holds
