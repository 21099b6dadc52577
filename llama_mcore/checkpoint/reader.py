"""Full parameters out of a checkpoint folder, whatever layout wrote it. Needs neither a job nor DeepSpeed."""

from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llama_mcore.checkpoint.layout import MANIFEST, WEIGHT, parse_fragment_key, read_manifest
from llama_mcore.data.ledger import Segment
from llama_mcore.errors import CheckpointError, Problem
from llama_mcore.model.config import ModelConfig
from llama_mcore.model.shapes import parameter_shapes
from llama_mcore.model.sharding import cut_of, unshard
from llama_mcore.train.state import TrainState


class CheckpointReader:
    """Full parameters from a checkpoint folder; files are memory-mapped, read as far as they are needed.

    Raises CheckpointError for a file that is missing or damaged, and for a parameter with a gap.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest = read_manifest(path)
        try:
            self.model = ModelConfig.model_validate(self.manifest["config"]["model"])
            segments = tuple(Segment.model_validate(segment) for segment in self.manifest["segments"])
            self.state = TrainState(self.manifest["step"], self.manifest["consumed_samples"], segments)
            self._tp_size = int(self.manifest["tp_size"])
            files = [(Path(entry["name"]).name, entry["tp_rank"]) for entry in self.manifest["files"]]
        except (LookupError, TypeError, ValueError) as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise CheckpointError(
                Problem("manifest", path / MANIFEST, f"does not describe a checkpoint ({reason})")
            ) from None
        self._shapes = parameter_shapes(self.model)
        self._pieces: dict[tuple[str, str, int], list[tuple[int, Any, str]]] = defaultdict(list)
        for name, tp_rank in files:
            self._index(path / name, tp_rank)

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
        return unshard([self._join(kind, name, rank).view(shape) for rank in ranks], cut)

    def _index(self, path: Path, tp_rank: int) -> None:
        try:
            file = safe_open(path, framework="pt")
            keys = [(parse_fragment_key(key), key) for key in file.keys()]  # noqa: SIM118  no mapping
        except (OSError, SafetensorError, ValueError) as error:
            raise CheckpointError(Problem("file", path, f"cannot be read ({error})")) from None
        for (kind, name, start), key in keys:
            self._pieces[kind, name, tp_rank].append((start, file, key))

    def _join(self, kind: str, name: str, tp_rank: int) -> Tensor:
        """The flat fp32 shard of one tensor-parallel rank from its fragments."""
        pieces, end = [], 0
        for start, file, key in sorted(self._pieces[kind, name, tp_rank], key=lambda piece: piece[0]):
            if start != end:
                break
            pieces.append(file.get_tensor(key))
            end += pieces[-1].numel()
        expected = self._shard_numel(name)
        if end != expected:
            raise CheckpointError(
                Problem(f"{kind} of {name}", end, f"elements in {self.path} where {expected} are needed")
            )
        return torch.cat(pieces)

    def _shard_numel(self, name: str) -> int:
        return self._shapes[name].numel() // (self._tp_size if cut_of(name) else 1)
