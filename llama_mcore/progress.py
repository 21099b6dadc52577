"""How far a pass over input files is: a bar on a terminal, a line now and then elsewhere. On stderr."""

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 10.0


class InputProgress:
    """Counts bytes of input, documents and tokens.

    `total_bytes` is the size of all inputs, 0 if nobody knows; `done` of them an earlier run has done.
    """

    def __init__(self, title: str, total_bytes: int, done: int = 0) -> None:
        self.title = title
        self.total_bytes = total_bytes
        self.done = done
        self.bytes = self.documents = self.tokens = 0
        self._started = self._last_line = time.perf_counter()
        self._bar = _bar() if sys.stderr.isatty() else None
        if self._bar:
            self._task = self._bar.add_task(title, total=total_bytes or None, completed=done, state="")

    def __enter__(self) -> "InputProgress":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    @property
    def seconds(self) -> float:
        return max(time.perf_counter() - self._started, 1e-9)

    @property
    def megabytes_per_second(self) -> float:
        return self.bytes / 1e6 / self.seconds

    @property
    def speed(self) -> str:
        return f"{self.bytes / 1e6:,.1f} MB in {self.seconds:.1f} s ({self.megabytes_per_second:.1f} MB/s)"

    def advance(self, *, bytes: int, documents: int = 0, tokens: int = 0) -> None:
        self.bytes += bytes
        self.documents += documents
        self.tokens += tokens
        if self._bar:
            self._bar.update(self._task, completed=self.done + self.bytes, state=self._state())
        elif time.perf_counter() - self._last_line > SECONDS_BETWEEN_LINES:
            self._last_line = time.perf_counter()
            print(f"{self.title}: {self._state()}{self._left()}", file=sys.stderr, flush=True)

    def _state(self) -> str:
        total = f" of {self.total_bytes / 1e6:,.1f}" if self.total_bytes else ""
        megabytes = f"{(self.done + self.bytes) / 1e6:,.1f}{total} MB"
        documents = f", {self.documents:,} documents" if self.documents else ""
        tokens = f", {self.tokens:,} tokens" if self.tokens else ""
        return f"{megabytes}, {self.megabytes_per_second:.1f} MB/s{documents}{tokens}"

    def _left(self) -> str:
        if not self.total_bytes:
            return ""
        left = max(0, self.total_bytes - self.done - self.bytes)
        return f", {left / max(self.bytes, 1) * self.seconds:.0f} s left"


def _bar() -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[state]}"),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=Console(stderr=True))
