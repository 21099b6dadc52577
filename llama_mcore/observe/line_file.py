"""Files of lines that a run adds to (metrics, timeline, attempts), opened and read in one way, whatever lies
there under their names."""

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Protocol

LONGEST = 16 << 20
"""Bytes of a line."""


class Fence(Protocol):
    """The lease that a run is held by."""

    @property
    def number(self) -> int:
        """Of the attempt: it grows from one to the next."""

    def check(self) -> None:
        """Raise OSError if another job has taken the run over."""


def read_lines(path: Path) -> Iterator[bytes]:
    """Whole lines, without their ends, one at a time: a file may have millions. What follows the last end is
    still being written, or was cut, and is left out.

    Waits for no pipe. Raises OSError, also for what is no file and for a line longer than `LONGEST`.
    """
    with open(path, "rb", opener=_open_regular) as file:
        number = 0
        while line := file.readline(LONGEST + 1):
            number += 1
            if len(line) > LONGEST:
                raise OSError(errno.EFBIG, f"line {number:,} is longer than {LONGEST:,} bytes", str(path))
            if line.endswith(b"\n"):
                yield line[:-1]


def open_to_append(path: Path) -> BinaryIO:
    """Made if it is not there. Unbuffered: a line that did not fit the disk must not be tried again when the
    file is closed. Raises OSError, also for what is no file."""
    return open(path, "ab+", buffering=0, opener=_open_regular)


def _open_regular(path: str, flags: int) -> int:
    descriptor = os.open(path, flags | os.O_NONBLOCK, 0o666)
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode) or stat.S_ISDIR(mode):  # of a folder `open` says so itself
        return descriptor
    os.close(descriptor)
    raise OSError(errno.EINVAL, "it is not a regular file", path)


def append(file: BinaryIO, line: bytes) -> None:
    """Raises OSError where the line is not written whole."""
    if file.write(line) < len(line):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def ends_torn(file: BinaryIO) -> bool:
    """Whether the last line of a file that is open to append lacks its end."""
    file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
    return file.read(1) not in (b"", b"\n")
