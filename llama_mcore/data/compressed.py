"""Decompressed bytes of .gz and .zst files as a stream, in bounded memory.

Python's own readers say neither in which member a file is damaged nor, for zstd, that its end is missing.
"""

import io
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import zstandard

from llama_mcore.errors import DataError, Problem

# Compressed bytes taken at a time: zstd gives all that they hold at once, at most 128 KiB for 4 of them.
_PIECE = 4096
_AT_MOST = 1 << 20
_LARGEST_WINDOW = 1 << 27  # what `zstd --long` writes; the decoder holds a window in memory


def open_gzip(path: Path) -> io.BufferedReader:
    """The text of a gzip file, all members of it."""
    return _open(path, "gzip member", lambda: zlib.decompressobj(wbits=31))


def open_zstd(path: Path) -> io.BufferedReader:
    """The text of a zstd file, all frames of it."""
    context = zstandard.ZstdDecompressor(max_window_size=_LARGEST_WINDOW)
    return _open(path, "zstd frame", context.decompressobj)


def _open(path: Path, member: str, start_member: Callable[[], Any]) -> io.BufferedReader:
    return io.BufferedReader(Decompressed(path, member, start_member), _AT_MOST)


class Decompressed(io.RawIOBase):
    """A file of members (gzip) or frames (zstd) one after the other; DataError where one is damaged."""

    def __init__(self, path: Path, member: str, start_member: Callable[[], Any]) -> None:
        self._path, self._member, self._start_member = path, member, start_member
        self._file: BinaryIO = path.open("rb", buffering=1 << 20)
        self._decoder: Any = None
        self._member_start = self._read_to = 0
        self._input = b""
        self._output = memoryview(b"")

    @property
    def position_on_disk(self) -> int:
        return self._read_to

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._output:
            if not self._advance():
                return 0
        size = min(len(buffer), len(self._output))
        buffer[:size] = self._output[:size]
        self._output = self._output[size:]
        return size

    def _advance(self) -> bool:
        """Decompress some more; False at the end of the file."""
        if not self._input:
            self._input = self._file.read(_PIECE)
            self._read_to += len(self._input)
        if not self._input:
            if self._decoder is None:
                return False
            raise self._damaged("is cut off before its end")
        if self._decoder is None:
            self._input = self._input.lstrip(b"\0")  # tapes and block devices pad with zeros
            if not self._input:
                return True
            self._member_start = self._read_to - len(self._input)
            self._decoder = self._start_member()
        try:
            self._decode()
        except (zlib.error, zstandard.ZstdError) as error:
            raise self._damaged(f"is damaged ({error})") from None
        return True

    def _decode(self) -> None:
        if isinstance(self._decoder, zstandard.ZstdDecompressionObj):
            self._output, self._input = memoryview(self._decoder.decompress(self._input)), b""
        else:
            self._output = memoryview(self._decoder.decompress(self._input, _AT_MOST))
            self._input = self._decoder.unconsumed_tail
        if self._decoder.eof:
            self._input = self._decoder.unused_data
            self._decoder = None

    def _damaged(self, bound: str) -> DataError:
        where = f"{self._path}, {self._member} at byte {self._member_start:,}"
        return DataError(Problem("input", where, bound, "fetch the file again or leave it out"))

    def close(self) -> None:
        self._file.close()
        super().close()
