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
    Life,
    Span,
    conclusion,
    read_lives,
    seconds_by_kind,
    spans_of,
)
from llama_mcore.observe.goodput.timeline import TIMELINE_FILE
from llama_mcore.observe.metrics import describe_duration


def show_goodput(run_dir: Path, *, as_json: bool = False, picture: Path | None = None) -> None:
    """Print where the time went, of each life and in total. Raises MissingInputError and DataError."""
    lives = read_lives(run_dir)
    spans = spans_of(lives)
    if not spans:
        raise DataError(Problem("timeline", run_dir / TIMELINE_FILE, "holds no time of a run yet"))
    if picture:
        from llama_mcore.observe.goodput.plot import draw

        draw(spans, picture, run_dir.resolve().name)
    if as_json:
        print(json.dumps(to_dict(lives, spans), indent=2))
        return
    console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
    console.print(conclusion(spans), markup=False)
    console.print(_table(lives, spans))


def to_dict(lives: Sequence[Life], spans: Sequence[Span]) -> dict[str, Any]:
    """Keys of --json."""
    total = seconds_by_kind(spans)
    return {
        "goodput": total[PRODUCTIVE] / sum(total.values()),
        "seconds": sum(total.values()),
        "seconds_by_kind": total,
        "lives": [
            {
                "life": life.number,
                "began": life.began,
                "job": life.job,
                "ranks": life.ranks,
                "exit_code": life.left,
                "checkpoints": life.saved,
                "seconds_by_kind": seconds_by_kind(span for span in spans if span.life == life.number),
            }
            for life in lives
        ],
    }


def _table(lives: Sequence[Life], spans: Sequence[Span]) -> Table:
    """A row for each life."""
    table = Table("life", box=None, padding=(0, 1, 0, 0), pad_edge=False)
    for name in (*KINDS, "all", "exit"):
        table.add_column(name, justify="right", no_wrap=True)
    for life in lives:
        seconds = seconds_by_kind(span for span in spans if span.life == life.number)
        table.add_row(str(life.number), *_durations(seconds), _ending(life))
    total = seconds_by_kind(spans)
    whole = sum(total.values())
    table.add_row("total", *_durations(total))
    table.add_row("share", *(f"{seconds / whole:.1%}" for seconds in [*total.values(), whole]))
    return table


def _durations(seconds: dict[str, float]) -> list[str]:
    return [describe_duration(value) for value in [*seconds.values(), sum(seconds.values())]]


def _ending(life: Life) -> str:
    if life.left is not None:
        return str(life.left)
    return "runs" if life.runs else "killed"
