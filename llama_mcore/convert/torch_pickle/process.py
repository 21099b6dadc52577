"""The process that reads pickles: started when it is first asked, kept for the next question."""

import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from typing import IO

COMMAND = (sys.executable, "-m", "llama_mcore.convert.torch_pickle.sandbox")


class PickledProcess:
    """Asked in a line of JSON, it answers in one. It ends with this process; one that failed is replaced."""

    def __init__(self, command: Sequence[str] = COMMAND) -> None:
        self._command = command
        self._process: subprocess.Popen[str] | None = None
        self._errors: IO[str] | None = None
        self._owner = 0

    def ask(self, question: str, seconds: float) -> str:
        """Raises TimeoutError, and EOFError with the last words of a process that ended instead."""
        process = self._running()
        assert process.stdin
        assert process.stdout
        until = time.monotonic() + seconds
        timer = threading.Timer(seconds, process.kill)
        timer.start()
        try:
            process.stdin.write(question + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        except OSError:
            answer = ""
        timer.cancel()
        if answer.endswith("\n"):
            return answer
        how = self._end()
        raise TimeoutError if time.monotonic() >= until else EOFError(how)

    def _running(self) -> "subprocess.Popen[str]":
        if self._process is None or self._owner != os.getpid():  # a fork has its pipes, and is not its owner
            self._errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115  as long as the process
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                text=True,
            )
            self._owner = os.getpid()
        return self._process

    def _end(self) -> str:
        """Exit code and last line of its errors."""
        assert self._process
        assert self._errors
        self._process.kill()
        code = self._process.wait()
        self._errors.seek(0)
        last = self._errors.read().strip().splitlines()[-1:]
        self._process = None
        return f"the process that did ended with {code}" + (f": {last[0]}" if last else "")
