"""Decompressed bytes of .gz and .zst files as a stream, in bounded memory.

`gzip.open` and `zstandard.open` are not used: they do not say in which member a file is damaged, and
zstandard's takes a file that was cut off for a complete one.
"""

import io
import zlib
from pathlib import Path
from typing import Any

import zstandard

from llama_mcore.errors import DataError, Problem

# zstd decompresses all that it is given at once: up to 128 KiB for four bytes.
_COMPRESSED_BYTES = 4096
_OUTPUT_BYTES = 1 << 20
_LARGEST_WINDOW = 1 << 27  # what `zstd --long` writes; the decoder holds a window in memory


def open_gzip(path: Path) -> io.BufferedReader:
    """Text of all members of a gzip file."""
    return io.BufferedReader(_Gzip(path), _OUTPUT_BYTES)


def open_zstd(path: Path) -> io.BufferedReader:
    """Text of all frames of a zstd file."""
    return io.BufferedReader(_Zstd(path), _OUTPUT_BYTES)


class Decompressed(io.RawIOBase):
    """Stream of the members (gzip) or frames (zstd) of a file; DataError where one is damaged."""

    member: str
    error: type[Exception]

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("rb", buffering=1 << 20)
        self._decoder: Any = None
        self._member_start = 0
        self.position_on_disk = 0
        self._input = b""
        self._output = memoryview(b"")

    def start_member(self) -> Any:
        """A decoder with the interface of `zlib.decompressobj`."""
        raise NotImplementedError

    def decode(self, decoder: Any, data: bytes) -> tuple[bytes, bytes]:
        """Some output, and the rest of the input for the next call."""
        raise NotImplementedError

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

    def close(self) -> None:
        self._file.close()
        super().close()

    def _advance(self) -> bool:
        """Decompress some more; False at the end of the file."""
        if not self._input:
            self._input = self._file.read(_COMPRESSED_BYTES)
            self.position_on_disk += len(self._input)
        if not self._input:
            if self._decoder is None:
                return False
            raise self._damaged("is cut off before its end")
        if self._decoder is None and not self._begin_member():
            return True
        try:
            output, self._input = self.decode(self._decoder, self._input)
        except self.error as error:
            raise self._damaged(f"is damaged ({error})") from None
        self._output = memoryview(output)
        if self._decoder.eof:
            self._input = self._decoder.unused_data
            self._decoder = None
        return True

    def _begin_member(self) -> bool:
        """Start the next member; False if only padding is left, as tapes and block devices write it."""
        self._input = self._input.lstrip(b"\0")
        self._member_start = self.position_on_disk - len(self._input)
        self._decoder = self.start_member() if self._input else None
        return bool(self._input)

    def _damaged(self, reason: str) -> DataError:
        where = f"{self._path}, {self.member} at byte {self._member_start:,}"
        return DataError(Problem("--input", where, reason, "download the file again, or leave it out"))


class _Gzip(Decompressed):
    member, error = "gzip member", zlib.error

    def start_member(self) -> Any:
        return zlib.decompressobj(wbits=31)

    def decode(self, decoder: Any, data: bytes) -> tuple[bytes, bytes]:
        return decoder.decompress(data, _OUTPUT_BYTES), decoder.unconsumed_tail


class _Zstd(Decompressed):
    member, error = "zstd frame", zstandard.ZstdError

    def start_member(self) -> Any:
        return zstandard.ZstdDecompressor(max_window_size=_LARGEST_WINDOW).decompressobj()

    def decode(self, decoder: Any, data: bytes) -> tuple[bytes, bytes]:
        return decoder.decompress(data), b""
