"""One optimizer step, and one evaluation."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from llama_mcore.data.loader import MicroBatch
from llama_mcore.model.attention import documents_of
from llama_mcore.parallel.groups import Groups
from llama_mcore.train.engine import DeepSpeedEngine


@dataclass(frozen=True)
class StepResult:
    """`loss` is the mean over all tokens of the step, `grad_norm` the global norm before clipping."""

    loss: float
    grad_norm: float
    skipped: bool
    """The gradient was not finite, so no weight changed."""


def train_step(
    engine: DeepSpeedEngine,
    batches: Iterator[MicroBatch],
    accumulation_steps: int,
    lr: float,
    groups: Groups,
    eod: int | None = None,
) -> StepResult:
    """Run the micro-batches of one step and update the weights. All ranks call it together."""
    for group in engine.optimizer.param_groups:
        group["lr"] = lr
    total = torch.zeros((), device=groups.device)
    for _ in range(accumulation_steps):
        loss = mean_loss(engine, next(batches), groups, eod)
        engine.backward(loss)
        unsharded_norm = _unsharded_grad_norm(engine, groups)
        engine.step()
        total += loss.detach().float()
    return StepResult(
        loss=_mean_over(total / accumulation_steps, groups.dp_group),
        grad_norm=float(engine.get_global_grad_norm() or 0.0) if unsharded_norm is None else unsharded_norm,
        skipped=not engine.was_step_applied(),
    )


def evaluate(
    engine: DeepSpeedEngine, batches: Iterable[MicroBatch], groups: Groups, eod: int | None = None
) -> float:
    """Mean loss per token over `batches`, of which every data-parallel rank has equally many."""
    engine.eval()
    with torch.no_grad():
        losses = [mean_loss(engine, batch, groups, eod).float() for batch in batches]
    engine.train()
    return _mean_over(torch.stack(losses).mean(), groups.dp_group)


def mean_loss(engine: DeepSpeedEngine, batch: MicroBatch, groups: Groups, eod: int | None = None) -> Tensor:
    """Mean cross-entropy of one micro-batch, in nats per token. With `eod`, attention stays inside the
    documents that this token closes."""
    tokens = batch.tokens.to(groups.device, non_blocking=True)
    labels = batch.labels.to(groups.device, non_blocking=True)
    documents = None if eod is None else documents_of(batch.tokens, eod)
    return engine(tokens, labels=labels, documents=documents)


def _mean_over(value: Tensor, group: dist.ProcessGroup) -> float:
    dist.all_reduce(value, group=group)
    return value.item() / group.size()


def _unsharded_grad_norm(engine: DeepSpeedEngine, groups: Groups) -> float | None:
    """Global gradient norm at ZeRO stage 0, where DeepSpeed clips by it but does not tell it; else None.

    Every rank holds the replicated parameters; only the cut ones are summed over the tensor-parallel group.
    """
    if engine.zero_optimization_stage() > 0 or not engine.is_gradient_accumulation_boundary():
        return None
    squares = torch.zeros(2, device=groups.device)  # replicated, cut
    for parameter in engine.module.parameters():
        squares[int(parameter.tensor_model_parallel)] += parameter.grad.square().sum()
    dist.all_reduce(squares[1:], group=groups.tp_group)
    return squares.sum().sqrt().item()
