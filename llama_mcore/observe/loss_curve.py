"""Loss curve of a run, as a PNG."""

from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

from llama_mcore.errors import DataError, LlamaMcoreError, Problem
from llama_mcore.observe.goodput.spans import PRODUCTIVE, read_attempts
from llama_mcore.observe.metrics_file import Row, read_metrics
from llama_mcore.picture import save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TRAIN_COLOR, VALID_COLOR, LR_COLOR, STOP_COLOR = "#1f4e79", "#c8501e", "#8a8a8a", "#3c8c3c"


class Point(Row):
    """A step, as far as the picture shows it."""

    loss: float | None
    """None if it was not finite."""
    lr: float
    valid_loss: float | None = None


def loss_curve(metrics: Path, output: Path, title: str | None = None) -> None:
    """Draw the losses and the learning rate of a run, with a mark at each resume that is in timeline.jsonl
    beside the metrics.

    `title` defaults to the name of the run's folder. Raises DataError where no step has a finite loss,
    OutputError where `output` cannot be written.
    """
    rows = read_metrics(metrics, Point)
    if not any(row.loss is not None for row in rows):
        raise DataError(Problem("metrics", metrics, "contains no finite loss", "let the run do a step first"))
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), dpi=120, layout="constrained")
    loss_axes, lr_axes = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    _draw_loss(loss_axes, rows, _resumed_after(metrics.parent))
    _draw_lr(lr_axes, rows)
    loss_axes.set_title(title or metrics.resolve().parent.name, loc="left", fontweight="bold")
    save_figure(figure, output)


def smoothed(values: list[float], window: int) -> list[float]:
    """Centred moving average over `window` values (one more if that is even), which does not lag.

    It leaves out `window // 2` values at each end, where an average over fewer would be as noisy as they are.
    """
    sums, width = [0.0, *accumulate(values)], 2 * (window // 2) + 1
    return [(end - start) / width for start, end in zip(sums, sums[width:], strict=False)]


def _resumed_after(run_dir: Path) -> list[int]:
    """Steps from which later attempts resumed, without attempts that trained nothing."""
    try:
        attempts = read_attempts(run_dir)
    except LlamaMcoreError:
        return []  # the picture needs the metrics alone
    trained = [[step for _, kind, step in attempt.entries if kind == PRODUCTIVE] for attempt in attempts]
    return [steps[0] - 1 for steps in trained if steps and steps[0] > 1]


def _draw_loss(axes: "Axes", rows: list[Point], resumed_after: list[int]) -> None:
    train = [(row.step, row.loss) for row in rows if row.loss is not None]
    valid = [(row.step, row.valid_loss) for row in rows if row.valid_loss is not None]
    steps, losses = [step for step, _ in train], [loss for _, loss in train]
    axes.plot(steps, losses, color=TRAIN_COLOR, alpha=0.3, linewidth=0.8, label="train")
    window = len(losses) // 20
    inner = steps[window // 2 : len(steps) - window // 2]
    axes.plot(inner, smoothed(losses, window), color=TRAIN_COLOR, linewidth=1.8, label="train, smoothed")
    for number, step in enumerate(resumed_after):
        label = "" if number else "stopped and resumed"
        axes.axvline(step, color=STOP_COLOR, linewidth=1.0, linestyle="--", label=label, zorder=1)
    if valid:
        axes.plot(
            *zip(*valid, strict=True), "o", color=VALID_COLOR, markersize=5, label="validation", zorder=3
        )
    last_step, last_loss = (valid or train)[-1]
    label = f"{'validation' if valid else 'train'} {last_loss:.3f}"
    axes.annotate(label, (last_step, last_loss), xytext=(0, 10), textcoords="offset points", ha="right")
    axes.set_ylabel("loss (nats per token)")
    axes.legend(frameon=False)
    _tidy(axes)


def _draw_lr(axes: "Axes", rows: list[Point]) -> None:
    axes.plot([row.step for row in rows], [row.lr for row in rows], color=LR_COLOR, linewidth=1.5)
    axes.set_ylim(bottom=0)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    axes.set_ylabel("learning rate")
    axes.set_xlabel("step")
    _tidy(axes)


def _tidy(axes: "Axes") -> None:
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
