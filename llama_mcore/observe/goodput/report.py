"""Report of `llama-mcore goodput`: where the time of a run went, as text, JSON or a picture."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from llama_mcore.errors import DataError, Problem
from llama_mcore.observe.goodput.spans import (
    KINDS,
    PRODUCTIVE,
    Attempt,
    Span,
    conclusion,
    read_attempts,
    seconds_by_kind,
    spans_of,
)
from llama_mcore.observe.goodput.timeline import TIMELINE_FILE
from llama_mcore.observe.metrics import describe_duration
from llama_mcore.picture import save_figure

COLORS = {
    "productive": "#2e7d32",
    "lost": "#c62828",
    "saving": "#1565c0",
    "evaluation": "#6a1b9a",
    "restarting": "#ef6c00",
    "ending": "#8d6e63",
    "down": "#bdbdbd",
}
_HOUR = 3600


def show_goodput(run_dir: Path, *, as_json: bool = False, picture: Path | None = None) -> None:
    """Print where the time of each attempt and of all went. Raises MissingInputError and DataError."""
    attempts = read_attempts(run_dir)
    spans = spans_of(attempts)
    if not spans:
        raise DataError(
            Problem(
                "timeline",
                run_dir / TIMELINE_FILE,
                "does not show any time yet",
                "wait until the run has set up",
            )
        )
    if picture:
        draw(spans, picture, run_dir.resolve().name)
    if as_json:
        print(json.dumps(to_dict(attempts, spans), indent=2))
        return
    console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
    console.print(conclusion(spans), markup=False)
    console.print(_table(attempts, spans))


def to_dict(attempts: Sequence[Attempt], spans: Sequence[Span]) -> dict[str, Any]:
    """Content of --json."""
    total = seconds_by_kind(spans)
    return {
        "goodput": total[PRODUCTIVE] / sum(total.values()),
        "seconds": sum(total.values()),
        "seconds_by_kind": total,
        "attempts": [
            {
                "attempt": attempt.number,
                "began": attempt.began,
                "job": attempt.job,
                "ranks": attempt.ranks,
                "exit_code": attempt.left,
                "checkpoints": attempt.saved,
                "seconds_by_kind": seconds_by_kind(span for span in spans if span.attempt == attempt.number),
            }
            for attempt in attempts
        ],
    }


def _table(attempts: Sequence[Attempt], spans: Sequence[Span]) -> Table:
    """Table with a row for each attempt, their total and its shares."""
    table = Table("attempt", box=None, padding=(0, 1, 0, 0), pad_edge=False)
    for name in (*KINDS, "all", "exit"):
        table.add_column(name, justify="right", no_wrap=True)
    for attempt in attempts:
        seconds = seconds_by_kind(span for span in spans if span.attempt == attempt.number)
        table.add_row(str(attempt.number), *_durations(seconds), _ending(attempt))
    total = seconds_by_kind(spans)
    whole = sum(total.values())
    table.add_row("total", *_durations(total))
    table.add_row("share", *(f"{seconds / whole:.1%}" for seconds in [*total.values(), whole]))
    return table


def _durations(seconds: dict[str, float]) -> list[str]:
    return [describe_duration(value) for value in [*seconds.values(), sum(seconds.values())]]


def _ending(attempt: Attempt) -> str:
    if attempt.left is not None:
        return str(attempt.left)
    return "runs" if attempt.runs else "killed"


def draw(spans: Sequence[Span], output: Path, title: str) -> None:
    """Draw bars over time, a row for each attempt and one for all. Raises OutputError."""
    from matplotlib.figure import Figure

    attempts = sorted({span.attempt for span in spans})
    rows = {attempt: row for row, attempt in enumerate(attempts, start=1)}
    figure = Figure(figsize=(11, 1.6 + 0.4 * len(attempts)), dpi=120, layout="constrained")
    axes = figure.subplots()
    start, unit, name = spans[0].began, *_unit(spans[-1].ended - spans[0].began)
    seconds = seconds_by_kind(spans)
    for kind in KINDS:
        for row in (0, *rows.values()):
            bars = [
                ((span.began - start) / unit, span.seconds / unit)
                for span in spans
                if span.kind == kind and row in (0, rows[span.attempt])
            ]
            label = f"{kind} {seconds[kind] / sum(seconds.values()):.1%}" if row == 0 else None
            axes.broken_barh(bars, (row - 0.4, 0.8), facecolors=COLORS[kind], label=label)
    axes.set_yticks([0, *rows.values()], ["all", *(f"attempt {attempt}" for attempt in attempts)])
    axes.invert_yaxis()
    axes.set_xlabel(f"{name} since the first start")
    axes.set_title(f"{title}: {conclusion(spans)}", loc="left", fontweight="bold", fontsize=10)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.35), ncols=len(KINDS), frameon=False, fontsize=8)
    save_figure(figure, output)


def _unit(seconds: float) -> tuple[float, str]:
    return (_HOUR, "hours") if seconds > 2 * _HOUR else (60.0, "minutes")
