"""Tensor-parallel communication that overlaps computation: start it, compute something else, wait.

Sequence parallelism (Korthikanti et al., 2022) keeps activations outside the GEMMs split along the sequence;
then a column-parallel GEMM is entered by an all-gather and a row-parallel one left by a reduce-scatter, and
the backward does the reverse. Without it activations are whole on every rank: entering costs nothing and
leaving is an all-reduce.
"""

import torch.distributed as dist
from torch import Tensor


class Pending:
    """Result of a collective that may still be running."""

    def __init__(self, result: Tensor, work: dist.Work | None = None) -> None:
        self._result = result
        self._work = work

    def wait(self) -> Tensor:
        """The result, once it is complete. On a GPU this orders streams and does not block the host."""
        if self._work is not None:
            self._work.wait()
        return self._result


class TensorParallel:
    """Collectives of one tensor-parallel group, on [s, b, h] split along s.

    Collective: all ranks of the group call every method.
    """

    def __init__(self, group: dist.ProcessGroup, sequence_parallel: bool) -> None:
        self.group = group
        self.size = group.size()
        self.rank = group.rank()
        self.sequence_parallel = sequence_parallel and self.size > 1

    def start_gather(self, x: Tensor) -> Pending:
        """[s/tp, b, h] -> [s, b, h] by all-gather under sequence parallelism; else x as it is."""
        if not self.sequence_parallel:
            return Pending(x)
        whole = x.new_empty(x.size(0) * self.size, *x.shape[1:])
        return Pending(whole, dist.all_gather_into_tensor(whole, x.contiguous(), self.group, async_op=True))

    def start_reduce(self, x: Tensor) -> Pending:
        """Sum partial [s, b, h] over the group: by reduce-scatter to [s/tp, b, h] under sequence parallelism,
        else by all-reduce in place."""
        if self.size == 1:
            return Pending(x)
        if not self.sequence_parallel:
            return Pending(x, dist.all_reduce(x, group=self.group, async_op=True))
        part = x.new_empty(x.size(0) // self.size, *x.shape[1:])
        return Pending(part, dist.reduce_scatter_tensor(part, x, group=self.group, async_op=True))

    def start_replicated_sum(self, gradient: Tensor, *, always: bool = False) -> Pending:
        """Sum, in place, the gradient of a replicated weight, of which each rank has a part: under sequence
        parallelism that of its tokens, or `always`, that of its heads."""
        if self.size == 1 or not (always or self.sequence_parallel):
            return Pending(gradient)
        return Pending(gradient, dist.all_reduce(gradient, group=self.group, async_op=True))

    def gather_each(self, x: Tensor) -> Tensor:
        """x [...] of every rank, [tp, ...]."""
        every = x.new_empty(self.size * x.size(0), *x.shape[1:])
        dist.all_gather_into_tensor(every, x, group=self.group)
        return every.view(self.size, *x.shape)
