"""Matplotlib figures as PNG files."""

from pathlib import Path
from typing import TYPE_CHECKING

from llama_mcore.files import output_errors, published

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def save_figure(figure: "Figure", output: Path) -> None:
    """Write a figure, completely or not at all. Raises OutputError."""
    # Agg by object, not by matplotlib.use: drawing must not change the caller's backend.
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    with published(output) as temporary, output_errors(output):
        figure.savefig(temporary, format="png")
