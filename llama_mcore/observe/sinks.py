"""Sinks of step reports: metrics.jsonl, TensorBoard, and lines on the terminal or in the log."""

import os
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from llama_mcore.errors import OutputError, Problem
from llama_mcore.observe.config import ObserveConfig
from llama_mcore.observe.line_file import Fence, append, json_line, open_to_append
from llama_mcore.observe.log import get_logger
from llama_mcore.observe.metrics import StepReport, describe_duration, describe_mfu, describe_step
from llama_mcore.observe.metrics_file import (
    ABANDONED_METRICS,
    METRICS_FILE,
    describe_steps,
    drop_steps_after,
    keep_steps_after,
    missing_steps,
    sync_listing,
)

TENSORBOARD_DIR = "tensorboard"
ETA_WINDOW = 50  # steps
_VALID_SCALARS = ("loss", "perplexity", "bits_per_byte", "tokens")


class MetricSinks:
    """Writer of every step of a run, on the one rank that holds the run's lease.

    A run that resumes at `start_step` has lost the steps after it: their lines leave metrics.jsonl and their
    TensorBoard events are hidden, so that no step appears twice.
    Raises OutputError where the run folder cannot be written, or another job has taken the run over.
    """

    def __init__(
        self,
        config: ObserveConfig,
        run_dir: Path,
        total_steps: int,
        start_step: int,
        lease: Fence,
        continues: Path | None = None,
        console: Console | None = None,
    ) -> None:
        """`continues`: the checkpoint that the run resumes from, if the steps before it may be in the metrics
        of another folder; they are if this one has none."""
        self._config = config
        self._run_dir = run_dir
        self._total_steps = total_steps
        self._start_step = start_step
        self._lease = lease
        self._continues = continues
        self._console = console or Console(file=sys.stdout, highlight=False, soft_wrap=True)
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with _writing(self._run_dir), ExitStack() as stack:
            self._run_dir.mkdir(parents=True, exist_ok=True)
            self._lease.check()  # the dropped lines may be another job's
            metrics = self._run_dir / METRICS_FILE
            kept = drop_steps_after(metrics, self._start_step)
            if kept:
                self._continues = None
            missing = [] if self._continues else missing_steps(kept, self._start_step)
            if missing:
                steps = describe_steps(missing)
                get_logger().warning(
                    "%s LACKS steps %s: they are lost, and audit-data will fail", metrics, steps
                )
            self._metrics = stack.enter_context(open_to_append(metrics))
            sync_listing(self._run_dir)
            self._events = self._open_events(stack)
            self._watcher = self._open_watcher(stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with _writing(self._run_dir):
            self._stack.close()

    def write(self, report: StepReport) -> None:
        """Record one step. A loss that is not finite becomes null in metrics.jsonl."""
        row = report.to_dict() | {"attempt": self._lease.number}
        if self._continues:
            row["continues"] = str(self._continues)
        with _writing(self._run_dir):
            self._lease.check()  # at each step: this process may have been stopped at any moment
            append(self._metrics, json_line(row))
            if self._events:
                self._events.write(report)
        self._continues = None
        with suppress(OSError):  # stdout may be on a full disk too: no reason to end a run
            self._watcher.write(report)

    def check(self) -> None:
        """Raise OutputError if another job has taken the run over."""
        with _writing(self._run_dir):
            self._lease.check()

    def sync(self) -> None:
        """Fsync the lines, before a checkpoint that relies on them."""
        with _writing(self._run_dir):
            os.fsync(self._metrics.fileno())

    def go_back(self, step: int) -> None:
        """Roll back to `step`: the lines of later steps move to the file of abandoned steps."""
        with _writing(self._run_dir):
            self._lease.check()
            keep_steps_after(self._run_dir / METRICS_FILE, step, self._run_dir / ABANDONED_METRICS)
            self._stack.close()
        self._start_step = step
        self.__enter__()

    def _open_events(self, stack: ExitStack) -> "_TensorBoard | None":
        if not self._config.tensorboard:
            return None
        events = _TensorBoard(self._run_dir / TENSORBOARD_DIR, purge_step=self._start_step + 1)
        stack.callback(events.close)
        return events

    def _open_watcher(self, stack: ExitStack) -> "_ProgressLine | _PlainLines":
        if not self._console.is_interactive:
            return _PlainLines(self._console, self._total_steps, self._start_step, self._config.log_interval)
        line = _ProgressLine(self._console, self._total_steps, self._start_step)
        stack.callback(line.close)
        return line


@contextmanager
def _writing(run_dir: Path) -> Iterator[None]:
    """Turn a full disk, a missing permission or a lease that is lost into an OutputError."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        remedy = (
            "free space or choose another folder" if error.errno else "nothing: that job continues the run"
        )
        raise OutputError(Problem("run.dir", run_dir, f"cannot be written ({reason})", remedy)) from error


class _TensorBoard:
    """TensorBoard scalars `train/*`, `valid*/*`, `data/*` and `speed/*`; events from `purge_step` on are
    hidden."""

    def __init__(self, log_dir: Path, purge_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(log_dir), purge_step=purge_step, flush_secs=30)

    def write(self, report: StepReport) -> None:
        scalars: dict[str, float] = {
            "train/loss": report.loss,
            "train/grad_norm": report.grad_norm,
            "train/lr": report.lr,
            "train/tokens": report.tokens,
            "speed/tokens_per_s": report.tokens_per_s,
            "speed/step_time_s": report.step_time_s,
            "speed/memory_bytes": report.memory_bytes,
        }
        if report.mfu_causal is not None and report.mfu_full is not None:
            scalars |= {"speed/mfu_causal": report.mfu_causal, "speed/mfu_full": report.mfu_full}
        scalars |= {f"data/{source}_windows": count for source, count in report.windows.items()}
        if report.valid_loss is not None:
            scalars["valid/loss"] = report.valid_loss
        for source, evaluation in report.valid.items():
            row = evaluation.to_dict()
            scalars |= {f"valid_{key}/{source}": row[key] for key in _VALID_SCALARS if key in row}
        for tag, value in scalars.items():
            self._writer.add_scalar(tag, value, report.step)

    def close(self) -> None:
        self._writer.close()


class _Eta:
    """Time to the last step, by the median of recent steps, which evaluations and saves do not affect."""

    def __init__(self, total_steps: int) -> None:
        self._total_steps = total_steps
        self._times: deque[float] = deque(maxlen=ETA_WINDOW)

    def update(self, report: StepReport) -> str:
        self._times.append(report.step_time_s)
        return describe_duration((self._total_steps - report.step) * median(self._times))


class _PlainLines:
    """Lines for a log: every `log_interval` steps, at the first and last step and at every evaluation."""

    def __init__(self, console: Console, total_steps: int, start_step: int, log_interval: int) -> None:
        self._console = console
        self._total_steps = total_steps
        self._first_step = start_step + 1
        self._log_interval = log_interval
        self._eta = _Eta(total_steps)

    def write(self, report: StepReport) -> None:
        eta = self._eta.update(report)
        if self._is_due(report):
            percent = 100 * report.step // self._total_steps
            self._console.print(
                f"step {report.step}/{self._total_steps} ({percent}%)  {describe_step(report)}  ETA {eta}"
            )

    def _is_due(self, report: StepReport) -> bool:
        return (
            report.step % self._log_interval == 0
            or report.step in (self._first_step, self._total_steps)
            or report.valid_loss is not None
            or report.skipped
            or report.decision != ""
        )


class _ProgressLine:
    """Progress line on a terminal, cut at its width, so that the ETA comes first. Evaluations, skipped
    updates and decisions leave a line that stays."""

    def __init__(self, console: Console, total_steps: int, start_step: int) -> None:
        self._eta = _Eta(total_steps)
        self._progress = Progress(
            MofNCompleteColumn(),
            BarColumn(bar_width=12),
            TextColumn("{task.description}"),
            console=console,
        )
        self._task = self._progress.add_task("starting", total=total_steps, completed=start_step)
        self._progress.start()

    def write(self, report: StepReport) -> None:
        mfu = "" if report.mfu_causal is None else f" {describe_mfu(report)}"
        line = (
            f"ETA {self._eta.update(report)} loss {report.loss:.3f} norm {report.grad_norm:.2f} "
            f"lr {report.lr:.1e} {report.tokens_per_s:,.0f} tok/s{mfu}"
        )
        self._progress.update(self._task, completed=report.step, description=line)
        if report.valid_loss is not None or report.skipped or report.decision:
            self._progress.console.print(f"step {report.step}  {describe_step(report)}")

    def close(self) -> None:
        self._progress.stop()
