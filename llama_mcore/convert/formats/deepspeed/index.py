"""Index of a DeepSpeed folder, whoever wrote it: the file and offset of each stretch of each tensor.

Its files are those of torch.save; their names come from `_get_ckpt_name` and `_get_zero_ckpt_name` of
deepspeed/runtime/engine.py.
"""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field, InstanceOf, ValidationError
from torch import Tensor

from llama_mcore.checkpoint.safetensors_io import StoredTensor
from llama_mcore.convert.torch_pickle.client import read_pickled
from llama_mcore.errors import CheckpointError, Problem, shown

MODULE_STATES = "model_states.pt"
_MODULE_FILE = re.compile(rf"(?:zero_pp_rank_(\d{{1,5}})_)?mp_rank_(\d{{2,5}})_{MODULE_STATES}", re.ASCII)
_CLASSES = (
    "deepspeed.utils.tensor_fragment.fragment_address",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
)
_LARGEST_STEP = 1 << 53  # a step that fp32 or fp64 counts

Stored = InstanceOf[StoredTensor]
Dimension = Annotated[int, Field(ge=0, le=1 << 40)]
Shape = Annotated[list[Dimension], Field(max_length=8)]


class SavedRecord(BaseModel):
    """Base of what DeepSpeed saves: the fields that are read, among others that are not."""

    model_config = ConfigDict(strict=True, frozen=True)


class ParallelSizes(SavedRecord):
    pp_degree: int = 1


class ModuleStates(SavedRecord):
    """Content of a `*_model_states.pt`: an engine's state of its module on one tensor-parallel rank."""

    module: dict[str, Stored | None] = {}
    """In the dtype that the module computes in; empty tensors at stage 3."""
    param_shapes: list[dict[str, Shape]] = []
    """Shapes on this tensor-parallel rank, in the order of the optimizer's groups."""
    buffer_names: list[str] = []
    shared_params: dict[str, str] = {}
    """Alias of a shared parameter -> its name."""
    global_steps: int = Field(ge=0)
    dp_world_size: int = Field(ge=1)
    mp_world_size: int = Field(ge=1)
    checkpoint_parallel_dimensions: ParallelSizes = ParallelSizes()
    model: dict[str, Any] | None = None
    """ModelConfig, in folders that we wrote."""
    kinds: list[str] | None = None
    """The choice of paths.KINDS, in folders that we wrote."""
    trained_steps: int | None = Field(default=None, ge=0)
    """Steps of the weights, in folders that we wrote: without moments, engines begin at step 0."""


@dataclass(frozen=True)
class Piece:
    """Consecutive elements of a stored tensor, which are a part of one parameter's flat shard."""

    stored: StoredTensor
    start: int
    numel: int

    def read(self) -> Tensor:
        if self.stored.stride is None:
            return self.stored.read(self.start, self.start + self.numel)
        return self.stored.full().view(-1)[self.start : self.start + self.numel]


@dataclass
class TensorIndex:
    """Tensors of a folder by the names of the module that DeepSpeed trained."""

    folder: Path
    kinds: tuple[str, ...]
    tp: int
    step: int
    model: dict[str, Any] | None
    shapes: list[dict[str, torch.Size]]
    """Shapes of the shards of each tensor-parallel rank."""
    pieces: dict[tuple[str, str, int], list[Piece]] = field(default_factory=dict)
    """(kind, name, tensor-parallel rank) -> the pieces of its flat shard, in order."""

    def dtypes(self, kind: str) -> set[torch.dtype]:
        return {
            piece.stored.dtype
            for (found, _, _), pieces in self.pieces.items()
            if found == kind
            for piece in pieces
        }


def read_files(paths: Sequence[Path]) -> list[Any]:
    """Contents of files that DeepSpeed wrote. Raises CheckpointError, MissingInputError."""
    return read_pickled(paths, _CLASSES)


M = TypeVar("M", bound=SavedRecord)


def parsed(kind: type[M], content: Any, path: Path) -> M:
    """`content` as a record. Raises CheckpointError for a file that holds something else."""
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "content"
        reason = f"was not written by DeepSpeed: {shown(where)}: {shown(first['msg'])}"
        raise CheckpointError(Problem("file", path, reason)) from None


def module_states(folder: Path) -> dict[tuple[int, int], ModuleStates]:
    """States of each (tensor-parallel, data-parallel) rank; up to stage 2 only data-parallel rank 0 has any.

    Raises CheckpointError for files that are missing, or not of one step of one run.
    """
    names = [path.name for path in folder.iterdir()]
    files = {
        (int(found[2]), int(found[1] or 0), found[1] is not None): folder / found[0]
        for name in names
        if (found := _MODULE_FILE.fullmatch(name))
    }
    others = [name for name in names if name.endswith(MODULE_STATES) and not _MODULE_FILE.fullmatch(name)]
    if others:
        reason = "was written with pipeline or expert parallelism, which is not supported"
        raise CheckpointError([Problem("file", folder / name, reason) for name in sorted(others)])
    # a folder that stage 3 and lower stages can load has both kinds, with the same content
    by_stage = {stage3: [key for key in files if key[2] == stage3] for stage3 in (False, True)}
    keys = sorted(by_stage[False] or by_stage[True])
    paths = [files[key] for key in keys]
    contents = read_files(paths)
    states = {
        key[:2]: parsed(ModuleStates, content, path)
        for key, content, path in zip(keys, contents, paths, strict=True)
    }
    _check_states(states, folder, stage3=not by_stage[False])
    return states


def _check_states(found: dict[tuple[int, int], ModuleStates], folder: Path, stage3: bool) -> None:
    if not found:
        raise CheckpointError(Problem("folder", folder, f"holds no *_{MODULE_STATES}"))
    first = found[min(found)]
    sizes = {(each.mp_world_size, each.dp_world_size) for each in found.values()}
    if len(sizes) > 1:
        raise CheckpointError(
            Problem("folder", folder, f"holds files of runs with different numbers of ranks: {shown(sizes)}")
        )
    steps = {f"mp_rank_{tp:02d}, rank {dp}": each.global_steps for (tp, dp), each in found.items()}
    check_one_step(steps, folder)
    if first.checkpoint_parallel_dimensions.pp_degree != 1:
        reason = "was written with pipeline parallelism, which is not supported"
        raise CheckpointError(Problem("folder", folder, reason))
    check_complete(
        set(found), first.mp_world_size, first.dp_world_size if stage3 else 1, f"*_{MODULE_STATES}", folder
    )
    if any(each.model != first.model for each in found.values()):
        raise CheckpointError(Problem("folder", folder, "holds files of different models"))


def check_complete(found: set[tuple[int, int]], tp: int, dp: int, files: str, folder: Path) -> None:
    """Raise CheckpointError with every rank that has no file, or one too many."""
    if tp * dp > 2 * len(found) + 64:  # sizes come from a file: a loop over them may not end
        reason = f"holds {len(found)} {files}, and {tp} x {dp} ranks wrote one each"
        raise CheckpointError(Problem("folder", folder, reason))
    expected = {(tp_rank, dp_rank) for tp_rank in range(tp) for dp_rank in range(dp)}
    problems = [
        Problem(files, f"tensor-parallel rank {tp_rank}, data-parallel rank {dp_rank}", f"{what} {folder}")
        for what, ranks in (
            ("is missing from", expected - found),
            (f"is not one of the {tp} x {dp} ranks that wrote", found - expected),
        )
        for tp_rank, dp_rank in sorted(ranks)
    ]
    if problems:
        raise CheckpointError(problems)


def check_one_step(steps: dict[str, int], folder: Path) -> int:
    """The step in all files. Raises CheckpointError where they differ."""
    if len(set(steps.values())) != 1:
        found = {step: next(file for file in steps if steps[file] == step) for step in steps.values()}
        listed = ", ".join(f"{step} in {found[step]}" for step in sorted(found))
        reason = f"holds files of different steps: {listed}"
        raise CheckpointError(Problem("folder", folder, reason, "take a folder of one save"))
    return next(iter(steps.values()))


def step_of(step: StoredTensor | int | float, path: Path) -> int:
    """The step count of an optimizer: a number, or a tensor of one element."""
    if isinstance(step, StoredTensor):
        if step.shape.numel() != 1:
            reason = f"has a step of shape {list(step.shape)}, not a number"
            raise CheckpointError(Problem("file", path, reason))
        step = step.read().item()
    if not (math.isfinite(step) and 0 <= step <= _LARGEST_STEP and step == int(step)):
        raise CheckpointError(Problem("file", path, f"has the step {shown(step)}, which is not a count"))
    return int(step)


def own_names(names: Iterable[str], states: ModuleStates) -> list[str]:
    """Names of parameters, without buffers and aliases."""
    others = {*states.buffer_names, *states.shared_params}
    return [name for name in names if name not in others]
