"""Files of JSON lines that a run appends to (metrics, timeline, attempts): opened, read and written in one
way, whatever exists under their names."""

import errno
import json
import math
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Protocol

LONGEST = 16 << 20
"""Bytes that a line may have."""


class Fence(Protocol):
    """Lease of a run."""

    @property
    def number(self) -> int:
        """Number of the attempt, which grows from one to the next."""

    def check(self) -> None:
        """Raise OSError if another job has taken the run over."""


def json_line(row: dict[str, Any]) -> bytes:
    """A line of JSON, with null for numbers that are not finite."""
    return json.dumps(_finite(row), separators=(",", ":"), allow_nan=False).encode() + b"\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_lines(path: Path) -> Iterator[bytes]:
    """Complete lines, without their ends, one at a time: a file may have millions. A last one without an end
    is still being written, or was cut, and is left out.

    Waits for no pipe. Raises OSError, also if it is not a regular file or a line is longer than `LONGEST`.
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
    """Open a file for appending; make it if it does not exist. Raises OSError, also if it is no regular
    file."""
    # unbuffered: a line that did not fit the disk must not be tried again when the file is closed
    return open(path, "ab+", buffering=0, opener=_open_regular)


def _open_regular(path: str, flags: int) -> int:
    descriptor = os.open(path, flags | os.O_NONBLOCK, 0o666)
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode) or stat.S_ISDIR(mode):  # `open` itself refuses a folder
        return descriptor
    os.close(descriptor)
    raise OSError(errno.EINVAL, "it is not a regular file", path)


def append(file: BinaryIO, line: bytes) -> None:
    """Append a line. Raises OSError where it is not written completely."""
    if file.write(line) < len(line):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def ends_torn(file: BinaryIO) -> bool:
    """True if the last line of a file that is open for appending lacks its end."""
    file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
    return file.read(1) not in (b"", b"\n")
