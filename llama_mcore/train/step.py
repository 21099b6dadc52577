"""One optimizer step, and the loss on batches that are not trained on."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from llama_mcore.data.loader import MicroBatch
from llama_mcore.distributed.collectives import begin_sum
from llama_mcore.distributed.device import Stopwatch, pinned
from llama_mcore.distributed.groups import Groups
from llama_mcore.model.attention import documents_of
from llama_mcore.train.engine import DeepSpeedEngine
from llama_mcore.train.update import finish_micro_batch


class Notices(NamedTuple):
    """Notices that a rank gives the others with its numbers of a step."""

    stop: bool = False
    """It is asked to stop."""
    unwritten: bool = False
    """It could not write its report of the step before."""
    unread: bool = False
    """It could not read its micro-batches of the next step."""
    saving: bool = False
    """It is not done with its part of the save in flight."""


@dataclass(frozen=True)
class StepResult:
    """Numbers of a step, the same on all ranks; not finite where they are not finite on any."""

    loss: float
    """Mean over all tokens of the step, in nats."""
    grad_norm: float
    """Global norm before clipping."""
    skipped: bool
    """Loss or gradient was not finite on some rank, so no weight changed on any."""
    notices: Notices
    """Notices that any rank gave."""


class Step:
    """One optimizer step in two parts. Both only queue work: neither the host nor the device waits for it.

    Collective: all ranks call every method.
    """

    def __init__(
        self,
        engine: DeepSpeedEngine,
        micro_batches: Sequence[MicroBatch],
        groups: Groups,
        *,
        eod: int | None = None,
        beat: Callable[[], None] = lambda: None,
    ) -> None:
        """Queue the forward of the first micro-batch, which changes nothing that lasts.

        `beat` is called after the backward of each micro-batch and again when its gradient is accumulated.
        """
        self.micro_batches = micro_batches
        self.forwards = Stopwatch()
        self._engine, self._groups, self._eod, self._beat = engine, groups, eod, beat
        self._weights = _batch_weights(micro_batches, groups)
        self._first: Tensor | None = self._forward(0)

    def finish(self, lr: float, before_update: Callable[[], None] = lambda: None) -> Tensor:
        """Queue the rest: the backwards, the other forwards and the update of the weights.

        Returns loss, gradient norm and 1 where the update was skipped, as this rank has them: float64 [3] on
        the device. `before_update` is called when all backwards are queued and neither weights nor moments
        have changed yet.
        """
        engine, count = self._engine, len(self.micro_batches)
        for group in engine.optimizer.param_groups:
            group["lr"] = lr
        total = torch.zeros((), device=self._groups.device)
        for number in range(count):
            loss = self._forward(number) if self._first is None else self._first
            self._first = None
            engine.backward(_nan_gradient_if_loss_not_finite(loss))
            self._beat()
            if engine.is_gradient_accumulation_boundary():
                before_update()
            outcome = finish_micro_batch(engine, self._groups)
            total += loss.detach().float()
            self._beat()
        assert outcome is not None
        return torch.stack(((total / count).double(), outcome.grad_norm, outcome.skipped))

    def discard(self) -> None:
        """Leave a step of which only the first forward is queued, and free what that has kept."""
        self._first = None
        self._engine.empty_partition_cache()  # ZeRO-3: weights that the backward would have released

    def _forward(self, number: int) -> Tensor:
        """Loss of a micro-batch, weighted."""
        with self.forwards.running():
            loss = mean_loss(self._engine, self.micro_batches[number], self._groups, self._eod)
            return loss if self._weights is None else loss * self._weights[number].to(loss.dtype)


class PendingResult:
    """Result of a step on its way from all ranks."""

    def __init__(self, numbers: Tensor, groups: Groups, notices: Notices = Notices()) -> None:  # noqa: B008  immutable
        """Begin to exchange what `Step.finish` returned, and this rank's notices, in one all-reduce.

        Collective: all ranks call it.
        """
        # Each number is taken from some ranks alone; times 0, what is not finite on others becomes NaN.
        taken = (groups.tp_rank == 0, groups.rank == 0, True)
        told = [torch.tensor(flags, dtype=torch.float64) for flags in (taken, notices)]
        factors, flags = (pinned(one).to(groups.device, non_blocking=True) for one in told)
        self._dp_size = groups.dp_size
        self._sum = begin_sum(torch.cat((numbers * factors, flags)))

    def wait(self) -> StepResult:
        """The result, once every rank's device has come to the end of the step."""
        values = self._sum.read()
        loss = values[0].float().item() / self._dp_size  # an fp32 sum, as each rank's own is
        _, grad_norm, skipped, *flags = values.tolist()
        return StepResult(loss, grad_norm, skipped > 0, Notices(*(flag > 0 for flag in flags)))


def train_step(
    engine: DeepSpeedEngine,
    micro_batches: Sequence[MicroBatch],
    lr: float,
    groups: Groups,
    *,
    beat: Callable[[], None] = lambda: None,
    before_update: Callable[[], None] = lambda: None,
) -> StepResult:
    """Run a step and wait for its result. The parameters are those of `Step`.

    Collective: all ranks call it.
    """
    step = Step(engine, micro_batches, groups, beat=beat)
    return PendingResult(step.finish(lr, before_update), groups).wait()


def _batch_weights(batches: Sequence[MicroBatch], groups: Groups) -> Tensor | None:
    """Weight of each micro-batch's mean loss among those of the step, over all ranks.

    float64 [batches] on the device; None where every token counts: all weigh 1. With a loss mask the mean of
    means is not the mean over all tokens, and would depend on which rank reads what.
    Collective: all ranks of a data-parallel group call it.
    """
    if all(batch.loss_mask is None for batch in batches):
        return None
    counts = pinned(torch.stack([_num_counting(batch) for batch in batches]))
    counts = counts.to(groups.device, non_blocking=True)
    total = counts.sum()
    dist.all_reduce(total, group=groups.dp_group)
    return counts / (total.clamp(min=1) / (len(batches) * groups.dp_size))


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
