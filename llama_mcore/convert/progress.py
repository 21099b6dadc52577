"""How far a conversion is: a bar on a terminal, now and then a line elsewhere."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

_SECONDS_BETWEEN_LINES = 10.0


@contextmanager
def byte_progress(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """Yields what is to be told of bytes that are done."""
    columns = (
        "{task.description}",
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    terminal = sys.stderr.isatty()
    started = last_line = perf_counter()
    done = 0
    with Progress(*columns, console=Console(stderr=True), disable=not terminal) as bar:
        task = bar.add_task(title, total=total)

        def advance(size: int) -> None:
            nonlocal done, last_line
            done += size
            bar.advance(task, size)
            now = perf_counter()
            if not terminal and now - last_line > _SECONDS_BETWEEN_LINES:
                last_line = now
                rate = done / (now - started)
                print(
                    f"{title}: {done / 1e9:.1f} of {total / 1e9:.1f} GB, {rate / 1e9:.2f} GB/s, "
                    f"{(total - done) / rate:.0f} s left",
                    file=sys.stderr,
                    flush=True,
                )

        yield advance
