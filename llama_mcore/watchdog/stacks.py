"""The Python stacks of another process, taken from outside: also where it holds the interpreter's lock."""

import faulthandler
import os
import signal
import time

REQUEST = signal.SIGUSR2
WAIT_S = 3.0
_POLL_S = 0.05
_QUIET_POLLS = 4
"""A dump that has not grown for so many looks is complete."""


class Stacks:
    """Made before the fork: the child answers, the parent asks."""

    def __init__(self) -> None:
        # Memory, not a file: what hangs may be the disk.
        self._file = os.memfd_create("stacks")

    def answer(self) -> None:
        """Let this process write the stacks of all its threads whenever it is asked."""
        # Written by the signal handler itself, in C, whatever Python is doing.
        faulthandler.register(REQUEST, file=self._file, all_threads=True, chain=False)

    def ask(self, pid: int) -> str:
        """The stacks; empty where the process does not answer: it is stopped, or waits in the kernel."""
        os.ftruncate(self._file, 0)
        os.lseek(self._file, 0, os.SEEK_SET)
        os.kill(pid, REQUEST)
        until = time.monotonic() + WAIT_S
        size, quiet = 0, 0
        while time.monotonic() < until and quiet < _QUIET_POLLS:
            time.sleep(_POLL_S)
            before, size = size, os.fstat(self._file).st_size
            quiet = quiet + 1 if size and size == before else 0
        return os.pread(self._file, size, 0).decode(errors="replace")
