"""A matplotlib figure as a PNG file, whole or not at all."""

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from llama_mcore.errors import OutputError, Problem

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def save_figure(figure: "Figure", output: Path, field: str) -> None:
    """Raises OutputError, which names `output` as `field`."""
    # Agg by object, not by matplotlib.use: drawing must not change the caller's backend.
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    temporary = output.with_name(output.name + ".tmp")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(temporary, format="png")
        temporary.rename(output)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        reason = f"cannot be written ({error.strerror})"
        raise OutputError(Problem(field, output, reason, "choose another place")) from error
