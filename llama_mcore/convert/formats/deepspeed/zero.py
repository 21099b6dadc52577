"""Folders that `engine.save_checkpoint` of DeepSpeed writes, at any ZeRO stage, with tensor parallelism.

ZeRO partitions the flat parameter groups of its optimizer over the data-parallel ranks:

    stage 1 and 2     a stretch of the whole group each, which begins and ends within parameters; the place of
                      each parameter in it is in `param_slice_mappings` (also with BF16_Optimizer)
    stage 3           an equal part of each parameter, the last one padded; parameter by parameter

(deepspeed/runtime/bf16_optimizer.py, zero/stage_1_and_2.py, zero/stage3.py; read like ds_to_universal.py.)
"""

import math
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from llama_mcore.checkpoint.paths import KINDS, WEIGHT
from llama_mcore.checkpoint.safetensors_io import StoredTensor
from llama_mcore.convert.formats.deepspeed.index import (
    ModuleStates,
    Piece,
    SavedRecord,
    Stored,
    TensorIndex,
    check_complete,
    check_one_step,
    module_states,
    own_names,
    parsed,
    read_files,
    step_of,
)
from llama_mcore.errors import CheckpointError, Problem, shown

OPTIMIZER_STATES = "optim_states.pt"
_OPTIMIZER_FILE = re.compile(
    rf"(?:bf16_|fp16_)?zero_pp_rank_(\d{{1,5}})_mp_rank_(\d{{2,5}})_{OPTIMIZER_STATES}", re.ASCII
)


class Adam(SavedRecord):
    """Adam moments of one flat group, [elements]."""

    exp_avg: Stored
    exp_avg_sq: Stored
    step: Stored | int | float | None = None


class AdamGroup(SavedRecord):
    step: int | float = 0
    """The step count, where apex or DeepSpeed's own Adam keeps it."""


class AdamStates(SavedRecord):
    state: dict[int, Adam]
    param_groups: list[AdamGroup]

    def step(self, group: int) -> StoredTensor | int | float:
        kept = self.state[group].step
        return self.param_groups[min(group, len(self.param_groups) - 1)].step if kept is None else kept


class Fragment(SavedRecord):
    """A `fragment_address`: elements of a flat group."""

    start: int = Field(ge=0)
    numel: int = Field(ge=0)


class FlatGroups(SavedRecord):
    """Optimizer state of stages 1 and 2."""

    base_optimizer_state: AdamStates
    single_partition_of_fp32_groups: list[Stored]
    param_slice_mappings: list[dict[str, Fragment]]


class PartitionedParameters(SavedRecord):
    """Optimizer state of stage 3; a group's parameters are those of `param_shapes`."""

    optimizer_state_dict: AdamStates
    fp32_flat_groups: list[Stored]


class FlatFile(SavedRecord):
    optimizer_state_dict: FlatGroups


class PartitionedFile(SavedRecord):
    optimizer_state_dict: PartitionedParameters


def read_zero(folder: Path) -> TensorIndex:
    """Index of the fp32 masters and moments; of the module's weights where the optimizer was not saved.

    Raises CheckpointError for files that are missing, or not of one step of one run; MissingInputError.
    """
    states = module_states(folder)
    index = TensorIndex(
        folder=folder,
        kinds=KINDS,
        tp=states[0, 0].mp_world_size,
        step=0,
        model=states[0, 0].model,
        shapes=[_shapes(each) for (_, dp_rank), each in sorted(states.items()) if dp_rank == 0],
    )
    files = _optimizer_files(folder)
    if not files:
        return _weights_alone(index, states)
    check_complete(
        {*files}, states[0, 0].mp_world_size, states[0, 0].dp_world_size, f"*_{OPTIMIZER_STATES}", folder
    )
    steps: dict[str, int] = {}
    for (tp_rank, dp_rank), content in zip(files, read_files(list(files.values())), strict=True):
        path, module = files[tp_rank, dp_rank], states[tp_rank, 0]
        opened = _groups_of(content, path, module, dp_rank)
        for group, adam_step in enumerate(opened.steps):
            steps[f"group {group} of {path.name}"] = step_of(adam_step, path)
        for kind, name, piece in opened.pieces():
            index.pieces.setdefault((kind, name, tp_rank), []).append(piece)
    return replace(index, step=check_one_step(steps, folder))


def _shapes(states: ModuleStates) -> dict[str, torch.Size]:
    return {name: torch.Size(shape) for group in states.param_shapes for name, shape in group.items()}


def _optimizer_files(folder: Path) -> dict[tuple[int, int], Path]:
    """(tensor-parallel, data-parallel) rank -> file, in this order."""
    files: dict[tuple[int, int], Path] = {}
    for path in sorted(folder.iterdir()):
        if not path.name.endswith(OPTIMIZER_STATES):
            continue
        found = _OPTIMIZER_FILE.fullmatch(path.name)
        rank = (int(found[2]), int(found[1])) if found else None
        if rank is None or rank in files:
            reason = "is a second file of its rank, or of pipeline or expert parallelism: neither can be read"
            raise CheckpointError(Problem("file", path, reason))
        files[rank] = path
    return dict(sorted(files.items()))


class _Groups:
    """Flat groups of one rank, and the place of each parameter in them."""

    def __init__(
        self, adam: AdamStates, masters: list[StoredTensor], mappings: list[dict[str, Fragment]], path: Path
    ) -> None:
        if not len(masters) == len(mappings) == len(adam.state) or {*adam.state} != {*range(len(masters))}:
            reason = (
                f"holds {len(masters)} groups of weights, {len(adam.state)} of moments and {len(mappings)} "
                "of names, which should be equally many"
            )
            raise CheckpointError(Problem("file", path, reason))
        self._adam, self._masters, self._mappings, self._path = adam, masters, mappings, path

    @property
    def steps(self) -> list[Any]:
        return [self._adam.step(group) for group in range(len(self._masters))]

    def pieces(self) -> Iterator[tuple[str, str, Piece]]:
        for group, (master, mapping) in enumerate(zip(self._masters, self._mappings, strict=True)):
            adam = self._adam.state[group]
            for kind, flat in zip(KINDS, (master, adam.exp_avg, adam.exp_avg_sq), strict=True):
                self._check(f"{kind} of group {group}", flat, mapping)
                for name, fragment in mapping.items():
                    yield kind, name, Piece(flat, fragment.start, fragment.numel)

    def _check(self, what: str, flat: StoredTensor, mapping: dict[str, Fragment]) -> None:
        needed = max((each.start + each.numel for each in mapping.values()), default=0)
        if flat.dtype != torch.float32 or flat.stride is not None or len(flat.shape) != 1:
            reason = f"is {flat.dtype} {shown(list(flat.shape))} in {self._path}, and must be flat fp32"
            raise CheckpointError(Problem("tensor", what, reason))
        if needed > flat.shape[0]:
            reason = f"has {flat.shape[0]} elements in {self._path}, and {needed} are needed"
            raise CheckpointError(Problem("tensor", what, reason))


def _groups_of(content: Any, path: Path, module: ModuleStates, dp_rank: int) -> _Groups:
    inner = content.get("optimizer_state_dict") if isinstance(content, dict) else None
    if isinstance(inner, dict) and "fp32_flat_groups" in inner:
        parted = parsed(PartitionedFile, content, path).optimizer_state_dict
        mappings = [_equal_parts(group, module.dp_world_size, dp_rank) for group in module.param_shapes]
        return _Groups(parted.optimizer_state_dict, parted.fp32_flat_groups, mappings, path)
    flat = parsed(FlatFile, content, path).optimizer_state_dict
    return _Groups(
        flat.base_optimizer_state, flat.single_partition_of_fp32_groups, flat.param_slice_mappings, path
    )


def _equal_parts(shapes: dict[str, list[int]], dp: int, dp_rank: int) -> dict[str, Fragment]:
    """Fragments of this rank in each parameter, without padding at its end (`partition` of stage 3)."""
    mapping, start = {}, 0
    for name, shape in shapes.items():
        numel = math.prod(shape)
        part = -(-numel // dp)
        mapping[name] = Fragment(start=start, numel=max(0, min(part, numel - dp_rank * part)))
        start += part
    return mapping


def _weights_alone(index: TensorIndex, states: dict[tuple[int, int], ModuleStates]) -> TensorIndex:
    """Index of a folder without optimizer: the weights that the module computes with."""
    shapes: list[dict[str, torch.Size]] = []
    for (tp_rank, dp_rank), each in sorted(states.items()):
        if dp_rank == 0:
            tensors = {name: each.module[name] for name in own_names(each.module, each)}
            stored = {name: tensor for name, tensor in tensors.items() if tensor is not None}
            shapes.append({name: tensor.shape for name, tensor in stored.items()})
            for name, tensor in stored.items():
                index.pieces[WEIGHT, name, tp_rank] = [Piece(tensor, 0, tensor.shape.numel())]
    if not any(shape.numel() for rank in shapes for shape in rank.values()):
        reason = f"holds no *_{OPTIMIZER_STATES}, and at ZeRO stage 3 the weights are in them"
        raise CheckpointError(Problem("folder", index.folder, reason))
    return replace(index, kinds=(WEIGHT,), step=states[0, 0].global_steps, shapes=shapes)
