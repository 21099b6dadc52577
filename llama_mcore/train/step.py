"""One optimizer step, and one evaluation."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
import torch.distributed as dist
from torch import Tensor

from llama_mcore.data.loader import MicroBatch
from llama_mcore.model.attention import documents_of
from llama_mcore.parallel.device import Stopwatch
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
    beat: Callable[[], None] = lambda: None,
    forward: Stopwatch | None = None,
) -> StepResult:
    """Run the micro-batches of one step and update the weights. All ranks call it together.

    `beat` is called after each micro-batch's backward, and once it is added up; `forward` runs in forwards.
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
        engine.backward(loss)
        beat()
        unsharded_norm = _unsharded_grad_norm(engine, groups)
        engine.step()
        total += loss.detach().float()
        beat()
    return StepResult(
        loss=_mean_over(total / accumulation_steps, groups.dp_group),
        grad_norm=float(engine.get_global_grad_norm() or 0.0) if unsharded_norm is None else unsharded_norm,
        skipped=not engine.was_step_applied(),
    )


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
