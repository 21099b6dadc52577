"""Writer of torch.save files, one tensor at a time, for tensors whose shapes are known beforehand.

torch.save takes all tensors at once. Given tensors without content it writes a file of the full size that
takes up no space on the disk; everything but the content of the tensors is copied from that file.
"""

import os
import re
import struct
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.serialization import skip_data

from llama_mcore.checkpoint.safetensors_io import TensorSpec, bytes_of, check_is_next

_ALIGNMENT = 64
_ZIP64_FROM = 1 << 30  # bytes of an entry; zipfile wants to know before it writes one over 2 GiB
_LOCAL_HEADER, _ZIP64_EXTRA = 30, 20  # bytes
_EXTRA_HEADER = struct.Struct("<2sH")
_TENSOR = re.compile(r"[^/]+/data/\d+")
# They promise the layout of torch's own zip writer, from which torch would compute the places of tensors.
_LEFT_OUT = re.compile(r"[^/]+/\.(format_version|storage_alignment)")


class TorchFile:
    """A new file of a dict of tensors, added in the order of `specs`; on the disk when the block ends.

    `torch.load` can map it: tensors lie at multiples of 64 bytes. The same content gives the same bytes.
    Raises OSError where the disk refuses, and ValueError for a tensor that is not the next one.
    """

    def __init__(self, path: Path, specs: Mapping[str, TensorSpec]) -> None:
        self._expected = iter(specs.items())
        self._entries = iter(_skeleton(path, specs))
        self._file = path.open("xb")
        self._archive = zipfile.ZipFile(self._file, "w")

    def add(self, name: str, tensor: Tensor) -> None:
        check_is_next(self._expected, name, tensor)
        entry = self._copy_to_next_tensor()
        assert entry, "as many entries as specs"
        self._write(entry, bytes_of(tensor))

    def __enter__(self) -> "TorchFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._file:
            if error is not None:
                with suppress(OSError, ValueError):  # or its destructor would try, and print what failed
                    self._archive.close()
            else:
                if left := self._copy_to_next_tensor():
                    raise ValueError(f"the content of {left} was not added")
                self._archive.close()
                self._file.flush()
                os.fsync(self._file.fileno())

    def _copy_to_next_tensor(self) -> str | None:
        for name, content in self._entries:
            if content is None:
                return name
            self._write(name, memoryview(content))
        return None

    def _write(self, name: str, content: memoryview) -> None:
        info = zipfile.ZipInfo(name)
        is_large = len(content) > _ZIP64_FROM
        begin = self._file.tell() + _LOCAL_HEADER + len(name) + _EXTRA_HEADER.size + is_large * _ZIP64_EXTRA
        padding = -begin % _ALIGNMENT
        info.extra = _EXTRA_HEADER.pack(b"FB", padding) + bytes(padding)
        with self._archive.open(info, "w", force_zip64=is_large) as entry:
            entry.write(content)


def _skeleton(path: Path, specs: Mapping[str, TensorSpec]) -> Iterator[tuple[str, bytes | None]]:
    """Entries of the file in their order, with their content; None for that of a tensor."""
    with FakeTensorMode():
        fakes = {name: torch.empty(shape, dtype=dtype) for name, (dtype, shape) in specs.items()}
    empty = path.with_suffix(".skeleton")
    try:
        with skip_data(materialize_fake_tensors=True):
            torch.save(fakes, empty)
        with zipfile.ZipFile(empty) as archive:
            names = [name for name in archive.namelist() if not _LEFT_OUT.fullmatch(name)]
            return iter([(name, None if _TENSOR.fullmatch(name) else archive.read(name)) for name in names])
    finally:
        empty.unlink(missing_ok=True)


def with_own_storage(tensor: Tensor) -> Tensor:
    """`tensor`, copied if it is a part of a larger one: torch.save would write all of that."""
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
