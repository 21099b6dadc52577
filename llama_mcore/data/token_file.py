"""Array in a file, of which slices are read.

Not a memory map: a file that is cut short under a map kills the process with SIGBUS, and a slice of a map is
no longer valid once the map is closed. Here a file that lost bytes is a DataError, and every slice is a copy.
A file replaced under its name changes nothing: the one that was opened stays open.
"""

import os
import weakref
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from llama_mcore.errors import DataError, MissingInputError, Problem, input_problem

_RESTORE = "restore it from a copy, or make it again with tools/preprocess_data.py"


class DiskArray:
    """Array of `count` numbers of `dtype` from byte `offset` of `path` on; slices have step 1.

    Several threads may read it at once, and so may a process forked from this one.
    """

    def __init__(self, path: Path, dtype: type[np.integer], count: int, *, offset: int = 0) -> None:
        self.path = path
        self.dtype = np.dtype(dtype)
        self._count = count
        self._offset = offset
        try:
            self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise MissingInputError(input_problem("dataset", path, error=error)) from None
        # Not at exit: a daemon thread may still be reading, and the file ends with the process.
        weakref.finalize(self, os.close, self._file).atexit = False

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, key: int) -> int: ...
    @overload
    def __getitem__(self, key: slice) -> NDArray[Any]: ...
    def __getitem__(self, key: int | slice) -> int | NDArray[Any]:
        if isinstance(key, slice):
            first, end, step = key.indices(self._count)
            if step != 1:
                raise ValueError(f"step {step}: only 1 is supported")
            return self.read_into(first, np.empty(max(0, end - first), self.dtype))
        index = key + self._count if key < 0 else key
        if not 0 <= index < self._count:
            raise IndexError(f"{key} of {self._count}")
        return int(self.read_into(index, np.empty(1, self.dtype))[0])

    def read_into(self, first: int, out: NDArray[Any]) -> NDArray[Any]:
        """Fill `out`, contiguous and of this dtype, from entry `first` on, without the GIL; return it."""
        rest = out.data.cast("B")
        position = self._offset + first * self.dtype.itemsize
        while rest:
            try:
                # One call returns at most 2 GiB.
                size = os.preadv(self._file, [rest], position)
            except OSError as error:
                raise self._damaged(f"cannot be read at byte {position:,} ({error.strerror})") from None
            if not size:
                raise self._damaged(f"ends before byte {position + len(rest):,}: it was truncated")
            rest, position = rest[size:], position + size
        return out

    def _damaged(self, reason: str) -> DataError:
        return DataError(Problem("dataset", self.path, reason, _RESTORE))
