"""One optimizer step, and the loss on batches that are not trained on."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from llama_mcore.data.loader import MicroBatch
from llama_mcore.distributed.collectives import agree_on_numbers
from llama_mcore.distributed.device import Stopwatch
from llama_mcore.distributed.groups import Groups
from llama_mcore.model.attention import documents_of
from llama_mcore.train.engine import DeepSpeedEngine
from llama_mcore.train.update import finish_micro_batch


@dataclass(frozen=True)
class StepResult:
    """Numbers of a step, the same on all ranks; not finite where they are not finite on any."""

    loss: float
    """Mean over all tokens of the step, in nats."""
    grad_norm: float
    """Global norm before clipping."""
    skipped: bool
    """Loss or gradient was not finite on some rank, so no weight changed on any."""


def train_step(
    engine: DeepSpeedEngine,
    micro_batches: Sequence[MicroBatch],
    lr: float,
    groups: Groups,
    *,
    eod: int | None = None,
    beat: Callable[[], None] = lambda: None,
    before_update: Callable[[], None] = lambda: None,
    forward: Stopwatch | None = None,
) -> StepResult:
    """Run the micro-batches of one step forward and backward, and update the weights.

    `beat` is called after the backward of each micro-batch and again when its gradient is accumulated;
    `before_update` when all backwards are queued and neither weights nor moments have changed yet; `forward`
    measures the forwards.
    Collective: all ranks call it.
    """
    for group in engine.optimizer.param_groups:
        group["lr"] = lr
    forward = forward or Stopwatch()
    total = torch.zeros((), device=groups.device)
    for batch, weight in zip(micro_batches, _batch_weights(micro_batches, groups), strict=True):
        with forward.running():
            loss = mean_loss(engine, batch, groups, eod) * weight
        engine.backward(_nan_gradient_if_loss_not_finite(loss))
        beat()
        if engine.is_gradient_accumulation_boundary():
            before_update()
        outcome = finish_micro_batch(engine, groups)
        total += loss.detach().float()
        beat()
    mean = _mean_over_dp(total / len(micro_batches), groups)
    (mean, norm), skipped = agree_on_numbers(
        groups, (mean, outcome.grad_norm.item()), outcome.skipped.item() > 0
    )
    return StepResult(mean, norm, skipped)


def _batch_weights(batches: Sequence[MicroBatch], groups: Groups) -> list[float]:
    """Weight of each micro-batch's mean loss among those of the step, over all ranks.

    1 where every token counts. With a loss mask the mean of means is not the mean over all tokens, and would
    depend on which rank reads what.
    Collective: all ranks of a data-parallel group call it.
    """
    if all(batch.loss_mask is None for batch in batches):
        return [1.0] * len(batches)
    counts = torch.stack([_num_counting(batch) for batch in batches])
    total = counts.sum().to(groups.device)
    dist.all_reduce(total, group=groups.dp_group)
    mean = max(total.item(), 1) / (len(batches) * groups.dp_size)
    return (counts / mean).tolist()


def _num_counting(batch: MicroBatch) -> Tensor:
    """Number of tokens that count in the loss; a float64 scalar on the CPU."""
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
    """Mean loss per token over `batches`, and the number of these tokens; None once `go_on` says no.

    Every data-parallel rank has equally many batches. `go_on` is called before each, and answers alike on all
    ranks.
    Collective: all ranks call it.
    """
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
    """Mean cross-entropy of one micro-batch, in nats per token.

    With `eod`, the token that closes a document, attention stays inside documents.
    """
    tokens = batch.tokens.to(groups.device, non_blocking=True)
    labels = batch.labels.to(groups.device, non_blocking=True)
    mask = None if batch.loss_mask is None else batch.loss_mask.to(groups.device, non_blocking=True)
    documents = None if eod is None else documents_of(batch.tokens, eod)
    return engine(tokens, labels=labels, loss_mask=mask, documents=documents)


def _nan_gradient_if_loss_not_finite(loss: Tensor) -> Tensor:
    """The same loss, whose gradient is NaN throughout if the loss is not finite.

    A NaN loss may have a finite gradient. This way DeepSpeed's check of the gradient, which it makes before
    the update and over all ranks, finds both.
    """
    return loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)


def _mean_over_dp(value: Tensor, groups: Groups) -> float:
    """Mean over the data-parallel group.

    Collective: all ranks of a data-parallel group call it.
    """
    dist.all_reduce(value, group=groups.dp_group)
    return value.item() / groups.dp_size
