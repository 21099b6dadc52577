"""DeepSpeed's universal folders, which a job of any layout loads; made by `ds_to_universal.py`, or here.

    latest_universal                              the name of the folder beside it
    step-00000100/mp_rank_00_model_states.pt      an engine's state of its module, without weights
    step-00000100/zero/optimizer_state.pt         settings of the optimizer
    step-00000100/zero/NAME/fp32.pt               a whole master weight, and how to split it
    step-00000100/zero/NAME/exp_avg.pt, exp_avg_sq.pt, step.pt

A job loads it with `engine.load_checkpoint(folder)` where its configuration has
{"checkpoint": {"load_universal": true}} (deepspeed/checkpoint/universal_checkpoint.py).
"""

import os
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from llama_mcore.checkpoint.durable_io import sync_folder, write_file
from llama_mcore.checkpoint.paths import KINDS, WEIGHT
from llama_mcore.checkpoint.safetensors_io import StoredTensor
from llama_mcore.convert.folder import write_tokenizer
from llama_mcore.convert.formats.deepspeed.index import (
    MODULE_STATES,
    ModuleStates,
    Piece,
    SavedRecord,
    Stored,
    TensorIndex,
    check_one_step,
    module_states,
    own_names,
    parsed,
    read_files,
    step_of,
)
from llama_mcore.convert.fused_weights import is_vocabulary
from llama_mcore.convert.model_weights import Weights
from llama_mcore.convert.registry import Advance, WriteOptions
from llama_mcore.convert.torch_pickle.writer import with_own_storage
from llama_mcore.errors import CheckpointError, Problem, shown
from llama_mcore.model.sharding import parameter_shapes, split_of

ZERO = "zero"
LATEST_UNIVERSAL = "latest_universal"
_OPTIMIZER = "optimizer_state.pt"
_STEP = "step.pt"
_MOST_GROUPS = 1024
_FILES = dict(zip(KINDS, ("fp32.pt", "exp_avg.pt", "exp_avg_sq.pt"), strict=True))


class ParameterFile(SavedRecord):
    param: Stored


class OptimizerFile(SavedRecord):
    """Settings of the optimizer; at stage 3 also its step, which other stages keep beside each parameter."""

    optimizer_state_dict: dict[str, Any] = Field(default_factory=dict)


def read_universal(folder: Path) -> TensorIndex:
    """Index of a folder that DeepSpeed's converter or `write` made.

    Raises CheckpointError for files that are missing, or not of one step; MissingInputError.
    """
    states = module_states(folder)
    first = states[0, 0]
    names = own_names(sorted(path.name for path in (folder / ZERO).iterdir() if path.is_dir()), first)
    kinds = _kinds(folder, names, first)
    index = TensorIndex(folder=folder, kinds=kinds, tp=1, step=0, model=first.model, shapes=[{}])
    flat_shapes = {name: shape for group in first.param_shapes for name, shape in group.items()}
    files = [(kind, name, folder / ZERO / name / _FILES[kind]) for kind in kinds for name in names]
    steps = [path for name in names if (path := folder / ZERO / name / _STEP).exists()]
    *contents, settings = read_files([*(path for *_, path in files), *steps, folder / ZERO / _OPTIMIZER])
    for (kind, name, path), content in zip(files, contents, strict=False):
        stored = _stored(content, path)
        # ds_to_universal leaves the tensors of stage 3 flat
        shape = torch.Size(flat_shapes.get(name, [])) if len(stored.shape) == 1 else stored.shape
        shape = shape if shape.numel() == stored.shape.numel() else stored.shape
        if index.shapes[0].setdefault(name, shape) != shape:
            reason = f"has shape {list(shape)}, and its weight has another"
            raise CheckpointError(Problem("file", path, reason))
        index.pieces[kind, name, 0] = [Piece(stored, 0, stored.shape.numel())]
    found = dict(zip(steps, contents[len(files) :], strict=True))
    return replace(index, step=_step(folder, found, settings, first))


def _kinds(folder: Path, names: list[str], states: ModuleStates) -> tuple[str, ...]:
    """The kinds that were written; moments may be present only so that an engine can load the folder."""
    if states.kinds is not None:
        return tuple(kind for kind in KINDS if kind in {WEIGHT, *states.kinds})
    has_moments = any((folder / ZERO / name / _FILES[kind]).exists() for name in names for kind in KINDS[1:])
    return KINDS if has_moments else (WEIGHT,)


def _stored(content: Any, path: Path) -> StoredTensor:
    stored = content if isinstance(content, StoredTensor) else parsed(ParameterFile, content, path).param
    if stored.dtype != torch.float32:
        raise CheckpointError(Problem("file", path, f"is {stored.dtype}, and must be fp32"))
    return stored


def _step(folder: Path, found: dict[Path, Any], settings: Any, states: ModuleStates) -> int:
    optimizer = folder / ZERO / _OPTIMIZER
    kept = parsed(OptimizerFile, settings, optimizer).optimizer_state_dict.get("state")
    steps = {path.parent.name: _checked_step(step, path) for path, step in found.items()}
    if isinstance(kept, dict):
        for group, state in kept.items():
            if isinstance(state, dict) and "step" in state:
                steps[f"group {group} of {_OPTIMIZER}"] = _checked_step(state["step"], optimizer)
    of_optimizer = check_one_step(steps, folder) if steps else states.global_steps
    return of_optimizer if states.trained_steps is None else states.trained_steps


def _checked_step(step: Any, path: Path) -> int:
    if not isinstance(step, StoredTensor | int | float):
        raise CheckpointError(Problem("file", path, f"has the step {shown(step)}, which is not a count"))
    return step_of(step, path)


def write(weights: Weights, folder: Path, options: WriteOptions, advance: Advance) -> None:
    """A folder that engines load at ZeRO 1 and 2 with any tensor and data parallelism, at 3 without tensor
    parallelism.

    Weights alone get moments of zeros and step 0, since an engine loads no folder without moments. Settings
    of the optimizer, such as weight decay, stay those of the job that loads.
    """
    step = weights.step if options.kinds == KINDS else 0
    place = folder / f"step-{weights.step:08d}"
    (place / ZERO).mkdir(parents=True)
    write_tokenizer(weights, place)
    for name, shape in parameter_shapes(weights.model).items():
        (place / ZERO / name).mkdir()
        for kind, file_name in _FILES.items():
            written = kind in options.kinds
            tensor = weights.full(name, kind).float() if written else _no_moment(shape)
            _save(
                {"param": with_own_storage(tensor) if written else tensor, **_splitting(name)},
                place / ZERO / name / file_name,
            )
            if written:
                advance(tensor.nbytes)
        _save(torch.tensor(float(step)), place / ZERO / name / _STEP)
        sync_folder(place / ZERO / name)
    _save(_optimizer(step), place / ZERO / _OPTIMIZER)
    for tp_rank in range(options.tp):
        states = _states(weights, options, step)
        for prefix in ("", "zero_pp_rank_0_"):  # stage 3 has names of its own
            _save(states, place / f"{prefix}mp_rank_{tp_rank:02d}_{MODULE_STATES}")
    sync_folder(place / ZERO)
    sync_folder(place)
    write_file(folder / LATEST_UNIVERSAL, [place.name.encode()])
    sync_folder(folder)


def _splitting(name: str) -> dict[str, Any]:
    """Keys that tell DeepSpeed how to split and pad a parameter (deepspeed/checkpoint/constants.py)."""
    split = split_of(name)
    words: dict[str, Any] = {} if split is None else {"cat_dim": split.dim}
    if split and split.stride > 1:
        words["param_n_sub_params"] = split.stride
    if is_vocabulary(name):
        words["vocab_tensor"] = True
    return words


def _optimizer(step: int) -> dict[str, Any]:
    # Empty groups, since their settings would replace those of the job that loads; and many, since an engine
    # fills as many groups of its optimizer as there are here.
    return {
        "ds_version": version("deepspeed"),
        "param_groups": [{} for _ in range(_MOST_GROUPS)],
        "optimizer_state_dict": {"state": {0: {"step": torch.tensor(float(step))}}, "param_groups": [{}]},
    }


def _states(weights: Weights, options: WriteOptions, step: int) -> dict[str, Any]:
    return {
        "module": {},
        "global_steps": step,
        "skipped_steps": 0,
        "dp_world_size": 1,
        "mp_world_size": options.tp,
        "ds_version": version("deepspeed"),
        "step": step,
        "trained_steps": weights.step,
        "model": weights.model.model_dump(mode="json"),
        "kinds": list(options.kinds),
    }


def _no_moment(shape: torch.Size) -> Tensor:
    """Zeros that take up one element on the disk."""
    return torch.zeros(1).expand(shape)


def _save(content: Any, path: Path) -> None:
    torch.save(content, path)
    with path.open("rb+") as file:
        os.fsync(file.fileno())
