"""Parameters out of a checkpoint folder, whatever layout wrote it. Needs neither a job nor DeepSpeed.

Files are memory-mapped and read as far as they are needed: a rank of any other layout reads its own stretch.
"""

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llama_mcore.checkpoint.layout import WEIGHT, parse_fragment_key
from llama_mcore.checkpoint.manifest import MANIFEST, RankFile, damaged_files, missing_files, read_manifest
from llama_mcore.errors import CheckpointError, Problem
from llama_mcore.model.config import ModelConfig
from llama_mcore.model.shapes import parameter_shapes
from llama_mcore.model.sharding import Cut, cut_of, unshard
from llama_mcore.train.state import TrainState


class CheckpointReader:
    """One checkpoint.

    Raises CheckpointError for a file that is missing, of another size, of another run or step, or not
    readable, and for a parameter with a gap. A flipped bit shows in `check_content` alone.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest = read_manifest(path)
        problems = missing_files(path, self.manifest)
        if problems:
            raise CheckpointError(problems)
        try:
            self.model = ModelConfig.model_validate(self.manifest.config.get("model"))
        except ValidationError as error:
            reason = " ".join(str(error).split())
            raise CheckpointError(
                Problem("manifest", path / MANIFEST, f"does not describe a model ({reason})")
            ) from None
        found = self.manifest
        self.state = TrainState(found.step, found.consumed_samples, found.segments, found.run_id)
        self._tp_size = found.layout.tp
        self._shapes = parameter_shapes(self.model)
        self._pieces: dict[tuple[str, str, int], list[tuple[int, int, Any, str]]] = defaultdict(list)
        for rank, file in enumerate(found.files):
            self._index(file, rank)
        for pieces in self._pieces.values():
            pieces.sort(key=lambda piece: piece[0])

    def check_content(self, rank: int = 0, world_size: int = 1) -> None:
        """Read every byte of this rank's share of the files. Raises CheckpointError with those that are not
        what was written."""
        problems = damaged_files(self.path, self.manifest.files[rank::world_size])
        if problems:
            raise CheckpointError(problems)

    def names(self) -> list[str]:
        """Parameters of the model, in its order."""
        return list(self._shapes)

    def full(self, name: str, kind: str = WEIGHT) -> Tensor:
        """The full fp32 tensor: master weight or Adam moment."""
        cut, tp_size = cut_of(name), self._tp_size
        shape = list(self._shapes[name])
        if cut is not None:
            shape[cut.dim] //= tp_size
        ranks = range(tp_size if cut is not None else 1)
        return unshard([self._read(kind, name, rank).view(shape) for rank in ranks], cut)

    def local(
        self, name: str, kind: str, tp_rank: int, tp_size: int, start: int = 0, numel: int | None = None
    ) -> Tensor:
        """Elements [start, start + numel) of the flattened fp32 shard that one rank of `tp_size` holds.

        Reads these elements alone; where columns are cut into more parts than they were saved in, their rows.
        """
        cut = cut_of(name)
        end = self._numel(name, tp_size) if numel is None else start + numel
        if cut is None or tp_size == self._tp_size:
            return self._read(kind, name, tp_rank if cut is not None else 0, start, end)
        if cut.dim == 0:
            return self._rows(kind, name, cut, tp_rank, tp_size, start, end)
        return self._columns(kind, name, tp_rank, tp_size, start, end)

    def _rows(
        self, kind: str, name: str, cut: Cut, tp_rank: int, tp_size: int, start: int, end: int
    ) -> Tensor:
        """Runs of rows that lie together in a saved shard, each as one stretch."""
        rows, width = self._shapes[name][0], self._shapes[name][1:].numel()
        here, there = rows // cut.stride // tp_size, rows // cut.stride // self._tp_size
        parts = []
        row, last = start // width, -(-end // width)
        while row < last:
            part, offset = divmod(row, here)
            source, source_offset = divmod(tp_rank * here + offset, there)
            count = min(here - offset, there - source_offset, last - row)
            shift = (part * there + source_offset - row) * width  # from our flat index to theirs
            first, stop = max(start, row * width), min(end, (row + count) * width)
            parts.append(self._read(kind, name, source, first + shift, stop + shift))
            row += count
        return torch.cat(parts) if parts else torch.empty(0)

    def _columns(self, kind: str, name: str, tp_rank: int, tp_size: int, start: int, end: int) -> Tensor:
        """Rows [first, last) of every saved shard that holds some of the columns."""
        columns = self._shapes[name][1]
        here, there = columns // tp_size, columns // self._tp_size
        first, last = start // here, -(-end // here)
        left, right = tp_rank * here, (tp_rank + 1) * here
        parts = []
        for source in range(left // there, -(-right // there)):
            block = self._read(kind, name, source, first * there, last * there).view(-1, there)
            parts.append(block[:, max(0, left - source * there) : right - source * there])
        flat = torch.cat(parts, dim=1).reshape(-1)
        return flat[start - first * here : end - first * here]

    def _index(self, file: RankFile, rank: int) -> None:
        path, found = self.path / file.name, self.manifest
        try:
            opened = safe_open(path, framework="pt")
            metadata = opened.metadata() or {}
            keys = [(parse_fragment_key(key), key) for key in opened.keys()]  # noqa: SIM118  no mapping
            sizes = [opened.get_slice(key).get_shape() for _, key in keys]
        except (OSError, SafetensorError, ValueError) as error:
            raise CheckpointError(Problem("file", path, f"cannot be read ({error})")) from None
        expected = {"run_id": found.run_id, "step": str(found.step), "rank": str(rank)}
        if metadata != expected:
            raise CheckpointError(Problem("file", path, f"is of {metadata}, the manifest of {expected}"))
        for ((kind, name, start), key), shape in zip(keys, sizes, strict=True):
            if name not in self._shapes or len(shape) != 1:
                raise CheckpointError(Problem("file", path, f"holds {key} {shape}, which is no fragment"))
            self._pieces[kind, name, file.tp_rank].append((start, start + shape[0], opened, key))

    def _read(self, kind: str, name: str, tp_rank: int, start: int = 0, end: int | None = None) -> Tensor:
        """Elements [start, end) of the flat fp32 shard of one saved rank, from its fragments."""
        size = self._numel(name, self._tp_size)
        end = size if end is None else end
        parts = list(self._parts(kind, name, tp_rank, start, end))
        found = sum(part.numel() for part in parts)
        if found != end - start:
            bound = f"elements in {self.path} where {end - start} are needed"
            raise CheckpointError(Problem(f"{kind} of {name}", found, bound))
        return torch.cat(parts) if parts else torch.empty(0)

    def _parts(self, kind: str, name: str, tp_rank: int, start: int, end: int) -> Iterator[Tensor]:
        """Stretches of the fragments from `start` on, as far as they follow each other."""
        for first, last, file, key in self._pieces[kind, name, tp_rank]:
            if first <= start < min(last, end):
                stop = min(last, end)
                yield file.get_slice(key)[start - first : stop - first]
                start = stop

    def _numel(self, name: str, tp_size: int) -> int:
        return self._shapes[name].numel() // (tp_size if cut_of(name) else 1)
