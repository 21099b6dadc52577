"""Where the time of a run went, as a picture: bars from the first start on, coloured by what was done."""

from collections.abc import Sequence
from pathlib import Path

from llama_mcore.observe.goodput.spans import KINDS, Span, conclusion, seconds_by_kind
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


def draw(spans: Sequence[Span], output: Path, title: str) -> None:
    """A row for each attempt and one for all, hours to the right. Raises OutputError."""
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
