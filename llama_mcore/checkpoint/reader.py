"""Reader of parameters from a checkpoint, whatever layout wrote it. Needs no process group and no DeepSpeed.

Only what is needed is read from the files: a rank of any other layout reads its own stretches.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from itertools import product
from operator import itemgetter
from pathlib import Path

import torch
from torch import Tensor

from llama_mcore.checkpoint.manifest import RankFile, damaged_files, missing_files, model_of, read_manifest
from llama_mcore.checkpoint.paths import MANIFEST, WEIGHT, parse_fragment_key
from llama_mcore.checkpoint.safetensors_io import DTYPE_NAMES, StoredTensor, read_safetensors
from llama_mcore.checkpoint.train_state import HealthState, TrainState
from llama_mcore.errors import CheckpointError, Problem, shown
from llama_mcore.model.config import ModelConfig
from llama_mcore.model.parameters import TpSplit
from llama_mcore.model.sharding import parameter_shapes, split_of, unshard

_FP32_BYTES = 4


class CheckpointReader:
    """One checkpoint.

    Raises CheckpointError for a file that is missing, of another size, of another run or step, or not
    readable, and for a parameter with a gap. A flipped bit in a tensor shows in `check_content` alone.
    """

    def __init__(self, path: Path, working: Callable[[], None] = lambda: None) -> None:
        """`working`: called after each file that was opened."""
        self.path = path
        self.manifest = read_manifest(path)
        problems = missing_files(path, self.manifest)
        if problems:
            raise CheckpointError(problems)
        found = self.manifest
        self.kinds: tuple[str, ...] = found.kinds
        opened = []
        for rank, file in enumerate(found.files):
            opened.append(self._open(file, rank))
            working()
        self.model = self._checked_model(opened)
        health = found.health or HealthState(last_scheduled=found.step)
        self.state = TrainState(
            step=found.step,
            consumed_samples=found.consumed_samples,
            segments=found.segments,
            run_id=found.run_id,
            began_from=found.began_from,
            health=health,
        )
        self._tp_size = found.layout.tp
        self._shapes = parameter_shapes(self.model)
        self._pieces: dict[tuple[str, str, int], list[tuple[int, int, StoredTensor]]] = defaultdict(list)
        for file, tensors in zip(found.files, opened, strict=True):
            self._index(file, tensors)
        self._check_complete()

    def check_content(
        self, rank: int = 0, world_size: int = 1, working: Callable[[], None] = lambda: None
    ) -> None:
        """Compare every byte of this rank's share of the files with the hashes, and call `working` now and
        then. Raises CheckpointError with the files that are damaged."""
        share = self.manifest.files[rank::world_size]
        problems = damaged_files(self.path, share, lambda size: working())
        if problems:
            raise CheckpointError(problems)

    def names(self) -> list[str]:
        """Parameters in the order of the model."""
        return list(self._shapes)

    def full(self, name: str, kind: str = WEIGHT) -> Tensor:
        """A whole fp32 tensor: master weight or Adam moment."""
        split, tp_size = split_of(name), self._tp_size
        shape = list(self._shapes[name])
        if split is not None:
            shape[split.dim] //= tp_size
        ranks = range(tp_size if split is not None else 1)
        return unshard([self._read(kind, name, rank).view(shape) for rank in ranks], split)

    def local(
        self, name: str, kind: str, tp_rank: int, tp_size: int, start: int = 0, numel: int | None = None
    ) -> Tensor:
        """Elements [start, start + numel) of the flattened fp32 shard that one rank of `tp_size` holds.

        Reads no others, except where columns are split into more parts than they were saved in: whole rows.
        """
        split = split_of(name)
        end = self._numel(name, tp_size) if numel is None else start + numel
        if split is None or tp_size == self._tp_size:
            return self._read(kind, name, tp_rank if split is not None else 0, start, end)
        if split.dim == 0:
            return self._rows(kind, name, split, tp_rank, tp_size, start, end)
        return self._columns(kind, name, tp_rank, tp_size, start, end)

    def _rows(
        self, kind: str, name: str, split: TpSplit, tp_rank: int, tp_size: int, start: int, end: int
    ) -> Tensor:
        """Elements of a shard split in rows: each run of rows that are adjacent in a saved shard in one
        read."""
        rows, width = self._shapes[name][0], self._shapes[name][1:].numel()
        here, there = rows // split.stride // tp_size, rows // split.stride // self._tp_size
        parts = []
        row, last = start // width, -(-end // width)
        while row < last:
            part, offset = divmod(row, here)
            source, source_offset = divmod(tp_rank * here + offset, there)
            count = min(here - offset, there - source_offset, last - row)
            shift = (part * there + source_offset - row) * width  # from our flat index to the saved one
            first, stop = max(start, row * width), min(end, (row + count) * width)
            parts.append(self._read(kind, name, source, first + shift, stop + shift))
            row += count
        return _joined(parts)

    def _columns(self, kind: str, name: str, tp_rank: int, tp_size: int, start: int, end: int) -> Tensor:
        """Elements of a shard split in columns: rows [first, last) of every saved shard with some of them."""
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

    def _open(self, file: RankFile, rank: int) -> dict[str, StoredTensor]:
        """Tensors of one file, not read yet."""
        path, found = self.path / file.name, self.manifest
        tensors, metadata = read_safetensors(path)
        expected = {"run_id": found.run_id, "step": str(found.step), "rank": str(rank)}
        if metadata != expected:
            reason = f"belongs to {shown(metadata)}, and the manifest to {shown(expected)}"
            raise CheckpointError(Problem("file", path, reason))
        return tensors

    def _checked_model(self, opened: list[dict[str, StoredTensor]]) -> ModelConfig:
        """The model of the manifest, which must fit into the files."""
        found, model = self.manifest, model_of(self.path, self.manifest)
        fragments, size = sum(map(len, opened)), sum(f.bytes for f in found.files)
        if model.num_layers > fragments or _FP32_BYTES * len(self.kinds) * model.num_params() > size:
            reason = f"describes a model that does not fit into {fragments:,} fragments of {size:,} bytes"
            raise CheckpointError(Problem("manifest", self.path / MANIFEST, reason))
        return model

    def _index(self, file: RankFile, tensors: dict[str, StoredTensor]) -> None:
        for key, stored in tensors.items():
            try:
                kind, name, start = parse_fragment_key(key)
                (numel,) = stored.shape
                known = kind in self.kinds and name in self._shapes and stored.dtype == torch.float32
                fits = known and 0 <= start <= start + numel <= self._numel(name, self._tp_size)
            except ValueError:
                fits = False
            if not fits:
                entry = f"{shown(key)} {DTYPE_NAMES[stored.dtype]} {list(stored.shape)}"
                reason = f"holds {entry}, which is not a fragment of the model"
                raise CheckpointError(Problem("file", self.path / file.name, reason))
            self._pieces[kind, name, file.tp_rank].append((start, start + numel, stored))

    def _check_complete(self) -> None:
        """Check that every element of every parameter and moment is stored once."""
        for name, shape in self._shapes.items():
            split = split_of(name)
            if split and shape[split.dim] % (split.stride * self._tp_size):
                reason = f"must divide {name} {list(shape)} of the model in {self.path}"
                raise CheckpointError(Problem("layout.tp", self._tp_size, reason))
            size = self._numel(name, self._tp_size)
            for kind, tp_rank in product(self.kinds, range(self._tp_size if split else 1)):
                pieces = self._pieces[kind, name, tp_rank]
                pieces.sort(key=itemgetter(0, 1))
                starts, ends = [piece[0] for piece in pieces], [piece[1] for piece in pieces]
                if [*starts, size] != [0, *ends]:
                    where = f"on tensor-parallel rank {tp_rank} of {self.path}"
                    reason = f"elements are stored {where}, and {size} are needed, each once"
                    raise CheckpointError(Problem(f"{kind} of {name}", sum(ends) - sum(starts), reason))

    def _read(self, kind: str, name: str, tp_rank: int, start: int = 0, end: int | None = None) -> Tensor:
        """Elements [start, end) of the flat fp32 shard of one rank that saved, from its fragments."""
        size = self._numel(name, self._tp_size)
        end = size if end is None else end
        return _joined(list(self._parts(kind, name, tp_rank, start, end)))

    def _parts(self, kind: str, name: str, tp_rank: int, start: int, end: int) -> Iterator[Tensor]:
        """Consecutive stretches of the fragments from `start` on."""
        for first, last, stored in self._pieces[kind, name, tp_rank]:
            if first <= start < min(last, end):
                stop = min(last, end)
                yield stored.read(start - first, stop - first)
                start = stop

    def _numel(self, name: str, tp_size: int) -> int:
        return self._shapes[name].numel() // (tp_size if split_of(name) else 1)


def _joined(parts: list[Tensor]) -> Tensor:
    """Flat stretches concatenated; a single one without a copy."""
    if len(parts) == 1:
        return parts[0]
    return torch.cat(parts) if parts else torch.empty(0)
