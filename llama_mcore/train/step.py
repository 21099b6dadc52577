"""One optimizer step, and one evaluation."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import islice

import torch
import torch.distributed as dist
from torch import Tensor

from llama_mcore.data.loader import MicroBatch
from llama_mcore.distributed.device import Stopwatch
from llama_mcore.distributed.groups import Groups
from llama_mcore.model.attention import documents_of
from llama_mcore.train.engine import DeepSpeedEngine


@dataclass(frozen=True)
class StepResult:
    """`loss` is the mean over all tokens of the step, `grad_norm` the global norm before clipping. The same
    on all ranks; not finite where it is not finite on any."""

    loss: float
    grad_norm: float
    skipped: bool
    """Loss or gradient was not finite on some rank, so no weight changed on any."""


def train_step(
    engine: DeepSpeedEngine,
    batches: Iterator[MicroBatch],
    accumulation_steps: int,
    lr: float,
    groups: Groups,
    eod: int | None = None,
    beat: Callable[[], None] = lambda: None,
    forward: Stopwatch | None = None,
    before_update: Callable[[], None] = lambda: None,
) -> StepResult:
    """Run the micro-batches of one step and update the weights. All ranks call it together.

    `beat` is called after each micro-batch's backward, and once it is added up; `forward` runs in forwards;
    `before_update` is called when all backwards are queued and neither weights nor moments have changed yet.
    """
    for group in engine.optimizer.param_groups:
        group["lr"] = lr
    forward = forward or Stopwatch()
    chosen = list(islice(batches, accumulation_steps))
    weights = _batch_weights(chosen, groups)
    total = torch.zeros((), device=groups.device)
    for batch, weight in zip(chosen, weights, strict=True):
        with forward.running():
            loss = mean_loss(engine, batch, groups, eod) * weight
        engine.backward(_nan_gradient_if_loss_not_finite(loss))
        beat()
        unsharded_norm = _unsharded_grad_norm(engine, groups)
        if engine.is_gradient_accumulation_boundary():
            before_update()
        with _update(engine, unsharded_norm):
            engine.step()
        total += loss.detach().float()
        beat()
    norm = float(engine.get_global_grad_norm() or 0.0) if unsharded_norm is None else unsharded_norm
    skipped = not (engine.was_step_applied() and math.isfinite(norm))
    return _agreed(_mean_over(total / accumulation_steps, groups.dp_group), norm, skipped, groups)


def _batch_weights(batches: Sequence[MicroBatch], groups: Groups) -> list[float]:
    """What each micro-batch's mean loss counts relative to the others of the step, over all ranks.

    1 where all have equally many tokens that count. Else the mean of means is not the mean over all tokens,
    and would depend on which rank reads what.
    """
    if all(batch.loss_mask is None for batch in batches):
        return [1.0] * len(batches)
    counts = torch.stack([_num_counting(batch) for batch in batches])
    total = counts.sum().to(groups.device)
    dist.all_reduce(total, group=groups.dp_group)
    mean = max(total.item(), 1) / (len(batches) * groups.dp_size)
    return (counts / mean).tolist()


def _num_counting(batch: MicroBatch) -> Tensor:
    """Tokens that count in the loss; a float64 scalar on the CPU."""
    if batch.loss_mask is None:
        return torch.tensor(batch.labels.numel(), dtype=torch.float64)
    return batch.loss_mask.sum(dtype=torch.float64)


def evaluate(
    engine: DeepSpeedEngine,
    batches: Iterable[MicroBatch],
    groups: Groups,
    eod: int | None = None,
    go_on: Callable[[], bool] = lambda: True,
) -> tuple[float, int] | None:
    """Mean loss per token over `batches`, of which every data-parallel rank has equally many, and how many
    tokens these are. Before each batch all ranks ask `go_on`, to the same answer; None if it says no."""
    engine.eval()
    sums = torch.zeros(2, dtype=torch.float64)
    with torch.no_grad():
        for batch in batches:
            if not go_on():
                engine.train()
                return None
            count = _num_counting(batch)
            loss = mean_loss(engine, batch, groups, eod).double().cpu()
            sums += torch.stack((loss * count, count))
    engine.train()
    sums = sums.to(groups.device)
    dist.all_reduce(sums, group=groups.dp_group)
    total, count = sums.tolist()
    return total / max(count, 1), int(count)


def mean_loss(engine: DeepSpeedEngine, batch: MicroBatch, groups: Groups, eod: int | None = None) -> Tensor:
    """Mean cross-entropy of one micro-batch, in nats per token. With `eod`, attention stays inside the
    documents that this token closes."""
    tokens = batch.tokens.to(groups.device, non_blocking=True)
    labels = batch.labels.to(groups.device, non_blocking=True)
    mask = None if batch.loss_mask is None else batch.loss_mask.to(groups.device, non_blocking=True)
    documents = None if eod is None else documents_of(batch.tokens, eod)
    return engine(tokens, labels=labels, loss_mask=mask, documents=documents)


def _nan_gradient_if_loss_not_finite(loss: Tensor) -> Tensor:
    """The loss, whose gradient is NaN throughout if it is not finite itself.

    A loss may be NaN and its gradient not. So the one check of the gradient, which DeepSpeed makes before the
    update and over all ranks, finds both.
    """
    return loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)


def _update(engine: DeepSpeedEngine, unsharded_norm: float | None) -> AbstractContextManager[None]:
    """Within the context `engine.step` changes nothing if the gradient is not finite: DeepSpeed sees to that
    at stages 1 to 3, and at stage 0 does not look."""
    if unsharded_norm is None or math.isfinite(unsharded_norm):
        return nullcontext()
    return _without_gradients(engine)


@contextmanager
def _without_gradients(engine: DeepSpeedEngine) -> Iterator[None]:
    """Take the gradients away when DeepSpeed has clipped them, which it cannot without any: an optimizer
    leaves parameters without a gradient alone."""
    hook = engine.optimizer.register_step_pre_hook(lambda *_: engine.zero_grad())
    try:
        yield
    finally:
        hook.remove()


def _agreed(loss: float, grad_norm: float, skipped: bool, groups: Groups) -> StepResult:
    """Rank 0's numbers on all ranks, not finite where they are not on any: what is decided by them must not
    differ."""
    numbers = torch.tensor([loss, grad_norm, float(skipped)], dtype=torch.float64, device=groups.device)
    if groups.rank:
        numbers[:2] *= 0  # NaN and infinity stay
    dist.all_reduce(numbers)
    loss, grad_norm, skips = numbers.tolist()
    return StepResult(loss, grad_norm, skipped=skips > 0)


def _mean_over(value: Tensor, group: dist.ProcessGroup) -> float:
    dist.all_reduce(value, group=group)
    return value.item() / group.size()


def _unsharded_grad_norm(engine: DeepSpeedEngine, groups: Groups) -> float | None:
    """Global gradient norm at ZeRO stage 0, where DeepSpeed clips by it but does not tell it; else None.

    Every rank holds the replicated parameters: the first tensor-parallel rank's count, and what is not finite
    on any.
    """
    if engine.zero_optimization_stage() > 0 or not engine.is_gradient_accumulation_boundary():
        return None
    squares = torch.zeros(2, device=groups.device)  # replicated, split
    for parameter in engine.module.parameters():
        squares[int(parameter.tensor_model_parallel)] += parameter.grad.square().sum()
    if groups.tp_rank:
        squares[0] *= 0  # NaN and infinity stay
    dist.all_reduce(squares, group=groups.tp_group)
    return squares.sum().sqrt().item()
