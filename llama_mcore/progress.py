"""Progress over bytes, on stderr: a bar on a terminal, elsewhere a line every ten seconds."""

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 10.0
_SHOWN_AS_GB = 1e10


class ByteProgress:
    """Bytes done, with the documents and tokens in them where these are counted.

    `total_bytes` is 0 where it is unknown; `done` of them were done by an earlier run.
    """

    def __init__(self, title: str, total_bytes: int, done: int = 0) -> None:
        self.title, self.total_bytes, self.done = title, total_bytes, done
        self.bytes = self.documents = self.tokens = 0
        self._started = self._last_line = time.perf_counter()
        self._on_terminal = sys.stderr.isatty()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[state]}"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._task = self._bar.add_task(title, total=total_bytes or None, completed=done, state="")

    def __enter__(self) -> "ByteProgress":
        if self._on_terminal:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._on_terminal:  # elsewhere rich would print an empty line
            self._bar.stop()

    @property
    def speed(self) -> str:
        """Bytes, time and rate of this run, for a summary."""
        return f"{self.bytes / 1e6:,.1f} MB in {self._seconds:.1f} s ({self._rate / 1e6:.1f} MB/s)"

    def advance(self, bytes: int, documents: int = 0, tokens: int = 0) -> None:
        self.bytes += bytes
        self.documents += documents
        self.tokens += tokens
        if self._on_terminal:
            self._bar.update(self._task, completed=self.done + self.bytes, state=self._state())
        elif time.perf_counter() - self._last_line > SECONDS_BETWEEN_LINES:
            self._last_line = time.perf_counter()
            print(f"{self.title}: {self._state()}{self._remaining()}", file=sys.stderr, flush=True)

    @property
    def _seconds(self) -> float:
        return max(time.perf_counter() - self._started, 1e-9)

    @property
    def _rate(self) -> float:
        return self.bytes / self._seconds

    def _state(self) -> str:
        size, unit = (1e9, "GB") if self.total_bytes >= _SHOWN_AS_GB else (1e6, "MB")
        total = f" of {self.total_bytes / size:,.1f}" if self.total_bytes else ""
        documents = f", {self.documents:,} documents" if self.documents else ""
        tokens = f", {self.tokens:,} tokens" if self.tokens else ""
        done = f"{(self.done + self.bytes) / size:,.1f}{total} {unit}"
        return f"{done}, {self._rate / 1e6:,.1f} MB/s{documents}{tokens}"

    def _remaining(self) -> str:
        if not self.total_bytes:
            return ""
        left = max(0, self.total_bytes - self.done - self.bytes)
        return f", {left / max(self.bytes, 1) * self._seconds:.0f} s left"
