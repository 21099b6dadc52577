"""Text output of plans: tables with lines in a terminal, aligned columns in a pipe or a file."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TextIO

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

_PIPE_WIDTH = 200


@dataclass(frozen=True)
class Grid:
    """A table whose first column holds names, and the others figures."""

    title: str
    headers: Sequence[str]
    rows: Sequence[Sequence[str]]


def show(parts: Sequence[str | Grid], file: TextIO | None = None) -> None:
    """Print paragraphs and tables, with an empty line between them."""
    file = file or sys.stdout
    console = Console(file=file, highlight=False, markup=False, soft_wrap=True)
    width = console.width if console.is_terminal else _PIPE_WIDTH
    for number, part in enumerate(parts):
        if number:
            console.print()
        if isinstance(part, str):
            _print_text(part, console)
        elif console.is_terminal:
            # not as the table's title, which would be folded to the width of the table
            console.print(part.title, style="bold", soft_wrap=False)
            console.print(_drawn(part, lines=True), width=width, soft_wrap=False)
        else:
            print(f"{part.title}\n{_plain(part)}", file=file)


def flops(number: float) -> str:
    """A number of operations as 5.76e23; the unit is in the header."""
    mantissa, _, exponent = f"{number:.2e}".partition("e")
    return f"{mantissa}e{int(exponent)}"


def whole(number: float) -> str:
    """A count as 12,345; with a decimal below ten."""
    return f"{number:,.0f}" if number >= 10 else f"{number:.2g}"


def _print_text(text: str, console: Console) -> None:
    """Print a paragraph; a terminal gets lines broken between words, but indented commands in one piece."""
    for line in text.splitlines():
        console.print(line, soft_wrap=not console.is_terminal or line.startswith("    "))


def _drawn(grid: Grid, lines: bool) -> Table:
    table = Table(
        box=SIMPLE_HEAD if lines else None,
        pad_edge=False,
        show_edge=False,
        padding=(0, 1 if lines else 2, 0, 0),
    )
    for number, header in enumerate(grid.headers):
        # one word per line in a terminal, where columns must be narrow; names may fold, figures may not
        text = header.replace(" ", "\n") if lines else header
        table.add_column(text, justify="right" if number else "left", overflow="fold", no_wrap=number > 0)
    for row in grid.rows:
        table.add_row(*row)
    return table


def _plain(grid: Grid) -> str:
    console = Console(width=_PIPE_WIDTH, no_color=True, highlight=False, markup=False)
    with console.capture() as captured:
        console.print(_drawn(grid, lines=False))
    return "\n".join(line.rstrip() for line in captured.get().splitlines())
