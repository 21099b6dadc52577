"""Checkpoints of megatron-core's dist_checkpointing (`torch_dist`).

    metadata.json        the kind of checkpoint
    common.pt            everything that exists once, the model's configuration among it (config.py)
    .metadata            which tensors there are, in which chunks, and where those are stored (chunks.py)
    __0_N.distcp         the chunks

Reads any grid of chunks, as any tensor- and pipeline-parallel size leaves them, of Megatron-LM's runs too.
names.py translates the keys, writer.py writes.
"""

import re
import sys
from functools import reduce
from pathlib import Path

import torch
from torch import Tensor

from llama_mcore.checkpoint.paths import KINDS, WEIGHT
from llama_mcore.convert.folder import name_problems, tokenizer_in
from llama_mcore.convert.formats.megatron.chunks import METADATA, ChunkedTensor, ChunkReader, read_metadata
from llama_mcore.convert.formats.megatron.config import read_common
from llama_mcore.convert.formats.megatron.names import CONFIG, CONTENT, MASTERS, OPTIMIZER, Source, sources
from llama_mcore.convert.formats.megatron.writer import write
from llama_mcore.convert.fused_weights import is_vocabulary
from llama_mcore.convert.model_weights import Weights
from llama_mcore.convert.registry import Format
from llama_mcore.errors import CheckpointError, MissingInputError, Problem, input_problem, shown
from llama_mcore.model.config import ModelConfig
from llama_mcore.model.sharding import parameter_shapes
from llama_mcore.small_file import read_json, read_small_file

TRACKER = "latest_checkpointed_iteration.txt"
"""Names the newest checkpoint of a run of Megatron-LM."""
_LARGEST_CONFIG = 1 << 16
_ITERATION = re.compile(r"\s*(?:(\d{1,9})|release)\s*", re.ASCII)
Found = dict[str, tuple[Source, ...]]
"""Canonical name of a parameter -> where it is stored."""


def found_in(path: Path) -> bool:
    return (path / TRACKER).is_file() or ((path / CONFIG).is_file() and (path / METADATA).is_file())


def open_folder(path: Path, model: ModelConfig | None) -> Weights:
    return MegatronWeights(_newest(path), model)


def _newest(path: Path) -> Path:
    """The checkpoint that a run's folder of Megatron-LM names; any other folder as it is."""
    tracker = path / TRACKER
    if not tracker.is_file():
        return path
    try:
        found = _ITERATION.fullmatch(read_small_file(tracker, 64).decode("ascii"))
    except (OSError, ValueError) as error:
        raise CheckpointError(Problem("file", tracker, f"cannot be read ({shown(error)})")) from None
    if found is None:
        raise CheckpointError(Problem("file", tracker, "does not name an iteration"))
    return path / (f"iter_{int(found[1]):07d}" if found[1] else "release")


class MegatronWeights:
    """`Weights` of a checkpoint folder: masters and moments where its optimizer state is stored parameter by
    parameter, else the model's weights, in the widest of their dtypes.

    Raises CheckpointError with every tensor that is missing, has another shape or dtype, or is not LLaMA's.
    """

    def __init__(self, folder: Path, named: ModelConfig | None) -> None:
        _check_backend(folder)
        metadata = read_metadata(folder)
        stored = metadata.tensors
        self.model, self.step = read_common(folder, metadata.common, named)
        in_model = {key: tensor for key, tensor in stored.items() if not _is_optimizer(key)}
        _check_size(folder, self.model)
        weights = _found(self.model, in_model, "")
        _check(folder, self.model, in_model, weights)
        self._sources = {WEIGHT: weights}
        self.kinds: tuple[str, ...] = (WEIGHT,)
        if optimizer := _optimizer(self.model, stored, weights):
            self._sources, self.kinds = optimizer, KINDS
        elif len(in_model) < len(stored):
            reason = "the optimizer state depends on the layout of its run and is not read: weights only"
            print(f"{folder}: {reason}", file=sys.stderr, flush=True)
        keys = {key for found in self._sources.values() for parts in found.values() for key, _ in parts}
        self._reader = ChunkReader(folder, {key: stored[key] for key in sorted(keys)})
        dtypes = {stored[key].dtype for parts in self._sources[WEIGHT].values() for key, _ in parts}
        self.dtype = reduce(torch.promote_types, dtypes)
        self.tokenizer = tokenizer_in(folder)

    def names(self) -> list[str]:
        return list(parameter_shapes(self.model))

    def full(self, name: str, kind: str = WEIGHT) -> Tensor:
        parts = [self._reader.full(key, index) for key, index in self._sources[kind][name]]
        tensor = parts[0] if len(parts) == 1 else torch.cat(parts)
        whole = tensor[: self.model.vocab_size] if is_vocabulary(name) else tensor
        return whole.to(self.dtype if kind == WEIGHT else torch.float32)


def _check_backend(folder: Path) -> None:
    try:
        content = read_json(folder / CONFIG, _LARGEST_CONFIG)
    except FileNotFoundError:
        raise MissingInputError(input_problem("file", folder / CONFIG)) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(Problem("file", folder / CONFIG, f"cannot be read ({shown(error)})")) from None
    backend = content.get("sharded_backend") if isinstance(content, dict) else None
    if backend != CONTENT["sharded_backend"]:
        reason = f"must be {CONTENT['sharded_backend']}"
        raise CheckpointError(Problem(f"{CONFIG}: sharded_backend", shown(backend), reason))


def _check_size(folder: Path, model: ModelConfig) -> None:
    # before memory is taken for as many layers as a file claims
    size = sum(path.stat().st_size for path in folder.glob("*.distcp"))
    if model.num_params() > size:
        reason = f"describes a model that does not fit into the {size:,} bytes of its chunks"
        raise CheckpointError(Problem("checkpoint", folder, reason))


def _is_optimizer(key: str) -> bool:
    return "optimizer." in key


def _found(model: ModelConfig, stored: dict[str, ChunkedTensor], prefix: str) -> Found:
    found = {}
    for name in parameter_shapes(model):
        for parts in sources(name):
            prefixed = tuple((f"{prefix}{key}", index) for key, index in parts)
            if all(key in stored for key, _ in prefixed):
                found[name] = prefixed
                break
    return found


def _check(folder: Path, model: ModelConfig, stored: dict[str, ChunkedTensor], found: Found) -> None:
    shapes = parameter_shapes(model)
    used = {key for parts in found.values() for key, _ in parts}
    # keys are Megatron's, names canonical: each is compared with its own kind
    problems = name_problems(shapes, found, folder) + name_problems(used, stored, folder)
    problems += [
        Problem("tensor", name, why)
        for name, parts in found.items()
        if (why := _wrong_shape(model, stored, name, parts))
    ]
    if problems:
        raise CheckpointError(problems)


def _wrong_shape(
    model: ModelConfig, stored: dict[str, ChunkedTensor], name: str, parts: tuple[Source, ...]
) -> str | None:
    """Reason why a parameter cannot be read from these tensors; None if it can."""
    needed = parameter_shapes(model)[name]
    rows = 0
    for key, index in parts:
        shape = stored[key].shape
        if index is not None:
            if shape[:1] != (model.num_layers,):
                return f"is stored for {shown(list(shape[:1]))} layers, and {model.num_layers} are needed"
            shape = shape[1:]
        if len(shape) != len(needed) or shape[1:] != needed[1:]:
            return f"has shape {list(shape)}, and {list(needed)} is needed"
        rows += shape[0]
    # tensor parallelism pads the vocabulary
    if rows == needed[0] or (rows > needed[0] and is_vocabulary(name)):
        return None
    return f"has {rows} rows, and {needed[0]} are needed"


def _optimizer(
    model: ModelConfig, stored: dict[str, ChunkedTensor], weights: Found
) -> dict[str, Found] | None:
    """Masters and moments; None unless all of them are stored in the shapes of their parameters.

    An fp32 model is its own master.
    """
    moments = {kind: _found(model, stored, f"{OPTIMIZER[kind]}.") for kind in KINDS if kind != WEIGHT}
    is_master = all(stored[key].dtype == torch.float32 for parts in weights.values() for key, _ in parts)
    masters = [_found(model, stored, f"{prefix}.") for prefix in MASTERS] + [weights] * is_master
    names = parameter_shapes(model)
    for master in masters:
        found = {WEIGHT: master, **moments}
        if all(
            name in each and not _wrong_shape(model, stored, name, each[name])
            for each in found.values()
            for name in names
        ):
            return found
    return None


FORMAT = Format(
    name="megatron", found_in=found_in, open=open_folder, write=write, is_cut=False, has_optimizer=True
)
