"""The update of the weights: DeepSpeed's step, and what it made of the gradient."""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from llama_mcore.distributed.groups import Groups
from llama_mcore.train.engine import DeepSpeedEngine
from llama_mcore.train.zero import OnePassStep


@dataclass(frozen=True)
class Outcome:
    """Result of an update, still on the device: to read it waits for the update."""

    grad_norm: Tensor
    """Global gradient norm before clipping; a float64 scalar."""
    skipped: Tensor
    """1 if the gradient was not finite and no weight changed, else 0; a float64 scalar."""


def finish_micro_batch(engine: DeepSpeedEngine, groups: Groups) -> Outcome | None:
    """Count a micro-batch whose backward has run; after the last of a step update the weights.

    Returns None before the last one. A gradient that is not finite changes nothing. Waits for the device at
    stages 0 and 3, with offload and with apex, where DeepSpeed asks whether it is.
    Collective: all ranks call it.
    """
    if not engine.is_gradient_accumulation_boundary():
        engine.step()
        return None
    if isinstance(engine.optimizer, OnePassStep):
        engine.step()
        grad_norm = engine.optimizer.grad_norm
        return Outcome(grad_norm, (~grad_norm.isfinite()).double())
    unsharded_norm = _unsharded_grad_norm(engine, groups)
    with _update(engine, unsharded_norm):
        engine.step()
    norm = float(engine.get_global_grad_norm() or 0.0) if unsharded_norm is None else unsharded_norm
    skipped = not (engine.was_step_applied() and math.isfinite(norm))
    values = torch.tensor([norm, float(skipped)], dtype=torch.float64, device=groups.device)
    return Outcome(*values)


def _update(engine: DeepSpeedEngine, unsharded_norm: float | None) -> AbstractContextManager[None]:
    """Context in which `engine.step` changes nothing if the gradient is not finite.

    At stages 1 to 3 DeepSpeed sees to that by itself; at stage 0 it does not check.
    """
    if unsharded_norm is None or math.isfinite(unsharded_norm):
        return nullcontext()
    return _without_gradients(engine)


@contextmanager
def _without_gradients(engine: DeepSpeedEngine) -> Iterator[None]:
    """Drop the gradients just before the optimizer's step, which skips parameters without one.

    Not earlier: DeepSpeed clips them first, and fails without any.
    """
    hook = engine.optimizer.register_step_pre_hook(lambda *_: engine.zero_grad())
    try:
        yield
    finally:
        hook.remove()


def _unsharded_grad_norm(engine: DeepSpeedEngine, groups: Groups) -> float | None:
    """Global gradient norm at ZeRO stage 0, where DeepSpeed clips by it but does not report it; else None.

    Parameters that are replicated count on the first tensor-parallel rank, and wherever they are not finite.
    Collective: all ranks of a tensor-parallel group call it.
    """
    if engine.zero_optimization_stage() > 0 or not engine.is_gradient_accumulation_boundary():
        return None
    squares = torch.zeros(2, device=groups.device)  # replicated, split
    for parameter in engine.module.parameters():
        squares[int(parameter.tensor_model_parallel)] += parameter.grad.square().sum()
    if groups.tp_rank:
        squares[0] *= 0  # what is not finite becomes NaN
    dist.all_reduce(squares, group=groups.tp_group)
    return squares.sum().sqrt().item()
