"""Cross-entropy of logits, and its gradient written over them, for one chunk of tokens.

    c tokens of the chunk, v vocabulary of this rank

Two ways to the same numbers. By softmax, with torch's operators: probabilities in fp32 are held besides, but
each exponential is computed once, which counts on a CPU. By passes over the logits alone, one that reads and
one that writes, with the sums over tensor-parallel ranks between them: the way for compiled functions.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from llama_mcore.distributed.tp_comm import TensorParallel
from llama_mcore.model.precision import widen


def by_softmax(
    logits: Tensor, targets: Tensor, mask: Tensor | None, tp: TensorParallel, scratch: Tensor | None = None
) -> Tensor:
    """Losses [c] where `mask` [c] is 1, 0 elsewhere; logits [c, v] become the gradient of their sum.

    targets [c] are ids of the whole vocabulary. `scratch` [c, v] holds what is wider than logits.
    Collective: an all-gather of two numbers a token over tensor-parallel ranks.
    """
    own = targets - tp.rank * logits.size(1)
    here = (own >= 0) & (own < logits.size(1))
    index = own.clamp(0, logits.size(1) - 1)[:, None]
    wide = widen(logits) if scratch is None else scratch.copy_(logits)
    target_logits = wide.gather(1, index)[:, 0].where(here, 0)
    largest = wide.amax(-1)
    probabilities = torch.softmax(wide, -1, out=wide)
    # The largest probability is at least 1/v, so its logarithm is exact enough: no second pass of exp.
    local_lse = largest - probabilities.amax(-1).log()
    lse, target_logits = _over_ranks(torch.stack((local_lse, target_logits)), tp)
    if tp.size > 1:
        # softmax normalised over this rank's columns; what is missing is the sum over all ranks
        probabilities.mul_((local_lse - lse).exp()[:, None])
    probabilities.scatter_add_(1, index, -here[:, None].to(wide.dtype))
    if mask is not None:
        probabilities.mul_(mask[:, None])
    logits.copy_(probabilities)
    return _masked(lse - target_logits, mask)


@dataclass(frozen=True)
class ByPasses:
    """The same by functions that pass over the logits, as below or compiled."""

    read: Callable[[Tensor, Tensor], Tensor]
    write: Callable[[Tensor, Tensor, Tensor, Tensor | None], None]
    both: Callable[[Tensor, Tensor, Tensor | None], Tensor]

    def __call__(
        self,
        logits: Tensor,
        targets: Tensor,
        mask: Tensor | None,
        tp: TensorParallel,
        scratch: Tensor | None = None,
    ) -> Tensor:
        """Same as `by_softmax`; leaves scratch alone."""
        if tp.size == 1:
            lse, target_logits = self.both(logits, targets, mask)
        else:
            own = targets - tp.rank * logits.size(1)
            lse, target_logits = _over_ranks(self.read(logits, own), tp)
            self.write(logits, own, lse, mask)
        return _masked(lse - target_logits, mask)


def read(logits: Tensor, targets: Tensor) -> Tensor:
    """[2, c] in fp32 or wider: log-sum-exp of logits [c, v], and logit of the target, 0 if it is elsewhere.

    targets [c] are columns of `logits`, or outside of them.
    """
    wide = widen(logits)
    return torch.stack((wide.logsumexp(-1), wide.where(_is_target(logits, targets), 0).sum(-1)))


def write(logits: Tensor, targets: Tensor, lse: Tensor, mask: Tensor | None) -> None:
    """Overwrite logits [c, v] with the gradient of the sum of losses; lse [c] is that of all ranks."""
    grad = (widen(logits) - lse[:, None]).exp() - _is_target(logits, targets).to(lse.dtype)
    logits.copy_(grad if mask is None else grad * mask[:, None])


def both(logits: Tensor, targets: Tensor, mask: Tensor | None) -> Tensor:
    """`read`, then `write`: one kernel where they are compiled together."""
    sums = read(logits, targets)
    write(logits, targets, sums[0], mask)
    return sums


BY_PASSES = ByPasses(read, write, both)


def _over_ranks(sums: Tensor, tp: TensorParallel) -> Tensor:
    """Log-sum-exp and target logits [2, c] of all ranks' columns from those of each rank's own."""
    if tp.size == 1:
        return sums
    lse, target_logits = tp.gather_each(sums).unbind(1)  # [tp, c] each
    return torch.stack((lse.logsumexp(0), target_logits.sum(0)))


def _is_target(logits: Tensor, targets: Tensor) -> Tensor:
    return torch.arange(logits.size(1), device=logits.device) == targets[:, None]


def _masked(losses: Tensor, mask: Tensor | None) -> Tensor:
    return losses if mask is None else losses * mask
