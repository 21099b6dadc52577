"""Timeline of a run: a line whenever rank 0 enters another phase. `llama-mcore goodput` reads it.

RUN_DIR/timeline.jsonl has all attempts of a run. Times are seconds since 1970; within an attempt they follow
the monotonic clock, so that they stay right when a clock is set.

    {"attempt": 3, "began": 1763920000.1, "job": "4711", "host": "n1", "ranks": 16}
    {"of": 3, "t": 1763920021.5, "phase": "train", "step": 1201}
    {"of": 3, "t": 1763920031.5, "saved": 1200}
    {"of": 3, "t": 1763920099.9, "left": 75}

An attempt without "left" was killed: attempts.jsonl says when, under the same "began". Each line names its
attempt, since one that was thought dead may still write when the next has begun; those of earlier versions do
not.
"""

import os
import socket
import time
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from llama_mcore.observe.line_file import Fence, append, ends_torn, json_line, open_to_append
from llama_mcore.observe.log import get_logger
from llama_mcore.observe.phases import Phase, PhaseListener

TIMELINE_FILE = "timeline.jsonl"


class Timeline(PhaseListener):
    """Writer of one attempt's part of the file, on rank 0.

    It writes nothing before `run_dir_ready`, as the folder may not be this run's until then, and nothing once
    another job has taken the run over. A full disk costs lines, and a warning, but never the run.
    """

    def __init__(self, run_dir: Path, lease: Fence, ranks: int, began: float) -> None:
        """`lease`: the run's, whose number is that of the attempt. `began`: start of the process that the
        launcher started."""
        self._path, self._lease = run_dir / TIMELINE_FILE, lease
        self._clock_offset = time.time() - time.monotonic()
        self._held_back: list[bytes] | None = []
        self._file: BinaryIO | None = None
        self._failed = self._torn = False
        self.exit_code = 0
        job = os.environ.get("SLURM_JOB_ID", "")
        host = socket.gethostname()
        self._write({"attempt": lease.number, "began": began, "job": job, "host": host, "ranks": ranks})

    def run_dir_ready(self) -> None:
        try:
            self._lease.check()
            self._file = open_to_append(self._path)
            self._torn = ends_torn(self._file)
        except OSError as error:
            self._fail(error)
        held_back, self._held_back = self._held_back, None
        for line in held_back or []:
            self._append(line)

    def enter(self, phase: Phase, step: int) -> None:
        self._note({"phase": phase, "step": step})

    def saved(self, step: int) -> None:
        self._note({"saved": step})

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Write the last line, with the exit code: the attempt is over, and was not killed."""
        if error is not None:
            self.exit_code = getattr(error, "exit_code", 1)
        self._note({"left": self.exit_code})
        if self._file:
            self._file.close()
        self._file = None

    def _note(self, what: dict[str, Any]) -> None:
        now = round(time.monotonic() + self._clock_offset, 3)
        self._write({"of": self._lease.number, "t": now, **what})

    def _write(self, line: dict[str, Any]) -> None:
        encoded = json_line(line)
        if self._held_back is None:
            self._append(encoded)
        else:
            self._held_back.append(encoded)

    def _append(self, line: bytes) -> None:
        if self._file is None:
            return
        try:
            self._lease.check()
            begin, self._torn = b"\n" * self._torn, True
            append(self._file, begin + line)
            self._torn = False
        except OSError as error:
            self._fail(error)

    def _fail(self, error: OSError) -> None:
        if not self._failed:
            get_logger().warning(
                "%s cannot be written (%s): goodput will not cover this time", TIMELINE_FILE, error.strerror
            )
        self._failed = True
