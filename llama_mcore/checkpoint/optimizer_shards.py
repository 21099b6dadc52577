"""Fragments: the part of each parameter whose fp32 master weight and Adam moments this rank owns.

ZeRO keeps both in flat fp32 buffers without names. This looks into DeepSpeed 0.19.8's optimizers to
find the stretch of a buffer that belongs to a parameter, at any stage.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed import DeepSpeedEngine
from torch import Tensor, nn

from llama_mcore.checkpoint.paths import KINDS, WEIGHT


@dataclass(frozen=True)
class Fragment:
    """Elements [start, start + numel) of this tensor-parallel rank's flattened parameter `name`."""

    name: str
    parameter: nn.Parameter
    start: int
    numel: int
    buffer: Tensor
    """The fp32 buffer that the optimizer updates; also the key of its state."""
    offset: int
    """Element of `buffer` at which the fragment starts."""
    optimizer: torch.optim.Optimizer

    def view(self, kind: str) -> Tensor:
        """The fragment [numel] of the master weight or of an Adam moment; writing to it changes the run."""
        whole = self.buffer.detach() if kind == WEIGHT else self.optimizer.state[self.buffer][kind]
        return whole.view(-1).narrow(0, self.offset, self.numel)


def owned_fragments(engine: DeepSpeedEngine, dp_rank: int) -> list[Fragment]:
    """Fragments of this rank; at stage 0 every data-parallel rank has all of them."""
    stage = engine.zero_optimization_stage()
    named = list(engine.module.named_parameters())
    if stage == 0:
        return list(_whole_parameters(engine, named))
    if stage == 3:
        return list(_stage3_fragments(named, dp_rank))
    return list(_stage12_fragments(engine, named))


def has_optimizer_state(fragment: Fragment) -> bool:
    return bool(fragment.optimizer.state[fragment.buffer])


def create_optimizer_state(fragments: list[Fragment], step: int) -> None:
    """Create the state that the optimizer would create at its first step, with `step` steps done.

    Existing moments are zeroed in place, since DeepSpeed keeps references to them.
    """
    optimizer_of = {fragment.buffer: fragment.optimizer for fragment in fragments}
    for buffer, optimizer in optimizer_of.items():
        state = optimizer.state[buffer]
        for kind in KINDS:
            if kind in state:
                state[kind].zero_()
            elif kind != WEIGHT:
                state[kind] = torch.zeros_like(buffer, requires_grad=False)
        if isinstance(optimizer, torch.optim.AdamW):
            optimizer.state[buffer]["step"] = torch.tensor(float(step), device=buffer.device)
        else:  # apex counts steps per group
            for group in optimizer.param_groups:
                group["step"] = step


def set_model_weights(engine: DeepSpeedEngine, dp_rank: int, full: Callable[[str], Tensor]) -> None:
    """Set the weights that the model computes with, once the masters are filled.

    `full` reads the whole tensor-parallel shard of a parameter, flat. It is called where this rank keeps all
    of that: at stage 0, and for the small parameters that stage 3 leaves gathered.
    """
    stage = engine.zero_optimization_stage()
    if stage in (1, 2):
        engine.optimizer.update_lp_params()
        return
    with torch.no_grad():
        for name, parameter in engine.module.named_parameters():
            if stage == 3:
                _set_partition(parameter, dp_rank)
            if parameter.numel():
                parameter.copy_(full(name).view(parameter.shape))


def _set_partition(parameter: Any, dp_rank: int) -> None:
    _, numel = _stage3_range(parameter, dp_rank)
    if numel:
        zero = parameter._z3_optimizer
        sub_group, offset, _ = zero.grad_position[zero.get_param_id(parameter)]
        master = zero.fp32_partitioned_groups_flat[sub_group].narrow(0, offset, numel)
        parameter.ds_tensor.view(-1)[:numel].copy_(master)


def _whole_parameters(engine: DeepSpeedEngine, named: list[tuple[str, Any]]) -> Iterator[Fragment]:
    for name, parameter in named:
        yield Fragment(name, parameter, 0, parameter.numel(), parameter, 0, engine.optimizer)


def _stage12_fragments(engine: DeepSpeedEngine, named: list[tuple[str, Any]]) -> Iterator[Fragment]:
    # `_hp_mapping` links a parameter to its stretch of the fp32 buffer of its group
    # (deepspeed/utils/tensor_fragment.py); None where another rank owns all of it
    optimizer = engine.optimizer.optimizer
    for name, parameter in named:
        mapping = parameter._hp_mapping
        if mapping is not None:
            lp, hp = mapping.lp_fragment_address, mapping.hp_fragment_address
            buffer = optimizer.param_groups[mapping.param_group_index]["params"][0]
            yield Fragment(name, parameter, lp.start, lp.numel, buffer, hp.start, optimizer)


def _stage3_fragments(named: list[tuple[str, Any]], dp_rank: int) -> Iterator[Fragment]:
    # Stage 3 splits each parameter into dp equal parts, padding the last, and lines a rank's parts up in
    # sub-groups (deepspeed/runtime/zero/stage3.py, `_get_fp32_opt_state_partition`).
    for name, parameter in named:
        zero = parameter._z3_optimizer
        sub_group, offset, _ = zero.grad_position[zero.get_param_id(parameter)]
        start, numel = _stage3_range(parameter, dp_rank)
        if numel:
            buffer = zero.fp32_partitioned_groups_flat[sub_group]
            yield Fragment(name, parameter, start, numel, buffer, offset, zero.optimizer)


def _stage3_range(parameter: Any, dp_rank: int) -> tuple[int, int]:
    """(start, numel) of this rank's part, without padding."""
    size = parameter.ds_tensor.ds_numel
    start = size * dp_rank
    return start, max(0, min(size, parameter.ds_numel - start))
