"""Where the time of a run went, as text or JSON: what `llama-mcore goodput` prints."""

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


def show_goodput(run_dir: Path, *, as_json: bool = False, picture: Path | None = None) -> None:
    """Print where the time went, of each attempt and in total. Raises MissingInputError and DataError."""
    attempts = read_attempts(run_dir)
    spans = spans_of(attempts)
    if not spans:
        raise DataError(Problem("timeline", run_dir / TIMELINE_FILE, "holds no time of a run yet"))
    if picture:
        from llama_mcore.observe.goodput.plot import draw

        draw(spans, picture, run_dir.resolve().name)
    if as_json:
        print(json.dumps(to_dict(attempts, spans), indent=2))
        return
    console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
    console.print(conclusion(spans), markup=False)
    console.print(_table(attempts, spans))


def to_dict(attempts: Sequence[Attempt], spans: Sequence[Span]) -> dict[str, Any]:
    """Keys of --json."""
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
    """A row for each attempt."""
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
