"""ZeRO stages 1 and 2 with weight gradients that are summed in fp32 as they are made, and a step that does
not wait for the device.

Subclasses of DeepSpeed 0.19.8's optimizers: partitions, states, checkpoints are theirs. What is replaced is
pinned to that version by tests/train/test_zero.py. Their own step reads and writes the gradients and weights
in several passes, and asks the host twice whether the gradient is finite.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import groupby
from operator import itemgetter
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime import engine as deepspeed_engine
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.utils import all_gather_dp_groups
from deepspeed.runtime.zero.stage_1_and_2 import INITIAL_MICRO_STEP_ID, DeepSpeedZeroOptimizer
from torch import Tensor

from llama_mcore.model.weight_grad import add_gradient
from llama_mcore.train.adamw import update

_ROW = 4096


class OnePassStep:
    """The update of this rank's partitions."""

    optimizer: torch.optim.AdamW
    clip_grad: float
    mpu: Any
    real_dp_process_group: list[dist.ProcessGroup]
    nccl_start_alignment_factor: int
    allgather_bucket_size: int

    grad_norm: Tensor
    """Global norm of the last step's gradient before clipping; a float64 scalar on the device. If it is not
    finite, no weight and no state has changed."""

    def _update(
        self,
        weights: Sequence[Sequence[Any]],
        flat: Sequence[Tensor],
        partitions: Sequence[Sequence[Tensor]],
        gradients: Sequence[Tensor],
    ) -> None:
        """Clip and apply the gradients, and gather the weights.

        For each group: its parameters, the flat buffer in which they lie, the partitions of that by
        data-parallel rank, and the fp32 gradient of this rank's partition.
        Collective: all ranks call it.
        """
        norm = self._global_norm(weights, gradients)
        skip = (~norm.isfinite()).float()
        limit = self.clip_grad or torch.inf
        clip = (limit / (norm + 1e-6)).clamp(max=1).float()
        ranks = [dist.get_rank(group) for group in self.real_dp_process_group]
        copies = [parts[rank] for parts, rank in zip(partitions, ranks, strict=True)]
        update(self.optimizer, gradients, copies, clip, skip)
        all_gather_dp_groups(
            *(flat, partitions, self.real_dp_process_group),
            *(self.nccl_start_alignment_factor, self.allgather_bucket_size),
        )
        self._lazy_init_hp_params_optimizer_state()  # type: ignore[attr-defined]
        self.grad_norm = self._global_grad_norm = norm

    def _global_norm(self, weights: Sequence[Sequence[Any]], gradients: Sequence[Tensor]) -> Tensor:
        """Global norm; parameters that are replicated count on the first tensor-parallel rank, and wherever
        they are not finite. A group is replicated as a whole, as norms are, or not.

        Collective: all ranks call it.
        """
        total = torch.zeros((), dtype=torch.float64, device=gradients[0].device)
        for group, gradient in zip(weights, gradients, strict=True):
            squares = _sum_of_squares(gradient)
            is_split = all(weight.tensor_model_parallel for weight in group)
            counts = is_split or self.mpu.get_tensor_model_parallel_rank() == 0
            total += squares if counts else squares * 0
        dist.all_reduce(total)
        return total.sqrt()


def _sum_of_squares(x: Tensor) -> Tensor:
    """Sum of squares of a flat fp32 tensor, a float64 scalar."""
    # row by row: a single fp32 sum is wrong by 1 % at 1e8 elements on a CPU
    count = x.numel() // _ROW * _ROW
    parts = x[:count].view(-1, _ROW), x[None, count:]
    return sum(torch.linalg.vector_norm(part, dim=1).double().square().sum() for part in parts)


class Stage1(OnePassStep, BF16_Optimizer):
    """Stage 1 in bf16: each parameter's `main_grad` is its part of the flat fp32 gradients."""

    reduce_dtype: torch.dtype = torch.float32
    """Precision in which gradients are reduced over data-parallel ranks."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for weight, gradient in self._with_gradients():
            weight.main_grad = gradient.view(weight.shape)
            weight._hp_grad = gradient  # what DeepSpeed's safe_get_full_grad looks for
            weight.overwrite_main_grad = True

    def _with_gradients(self) -> Iterator[tuple[Any, Tensor]]:
        for weights, gradients in zip(self.bf16_groups, self.fp32_groups_gradients, strict=True):
            yield from zip(weights, gradients, strict=True)

    @torch.no_grad()
    def _update_hp_grad(self, lp: Tensor, group_idx: int, param_idx: int, clear_lp_grads: bool) -> None:
        # by a parameter's hook, which autograd also calls where it was given no gradient
        if lp.grad is not None:
            add_gradient(lp, lp.grad)

    @torch.no_grad()
    def reduce_gradients(self, pipeline_parallel: bool = False) -> None:
        """Mean over the data-parallel ranks of the gradient of this rank's partitions, after a step's last
        backward.

        Collective: all ranks of a data-parallel group call it.
        """
        for weight, gradient in self._with_gradients():
            if weight.overwrite_main_grad:  # no gradient in this step: what is there is the last step's
                gradient.zero_()
        for whole, part, group in zip(
            self.fp32_groups_gradients_flat,
            self.fp32_groups_gradient_flat_partition,
            self.real_dp_process_group,
            strict=True,
        ):
            size = dist.get_world_size(group)
            if size > 1:
                sent = whole.to(self.reduce_dtype)
                received = part if sent is whole else sent.new_empty(part.shape)
                dist.reduce_scatter_tensor(received, sent, group=group)
                torch.div(received, size, out=part)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        self._update(
            self.bf16_groups,
            self.bf16_groups_flat,
            self.bf16_partitioned_groups,
            self.fp32_groups_gradient_flat_partition,
        )

    def clear_hp_grads(self) -> None:
        for weight, _ in self._with_gradients():
            weight.overwrite_main_grad = True


class Stages12InFp32(OnePassStep, DeepSpeedZeroOptimizer):
    """Stages 1 and 2 in fp32, where autograd's gradients are what is summed."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        self.micro_step_id = INITIAL_MICRO_STEP_ID
        gradients = [self._flat_gradient(group) for group in range(len(self.bit16_groups))]
        self._update(
            self.bit16_groups, self.bit16_groups_flat, self.parallel_partitioned_bit16_groups, gradients
        )

    def _flat_gradient(self, group: int) -> Tensor:
        """fp32 gradient of this rank's partition, which is no longer kept."""
        parts, size = self.averaged_gradients[group], int(self.partition_size[group])
        self.averaged_gradients[group] = self.all_grad_tensors[group] = None
        return self.flatten_dense_tensors_aligned(parts, size)


class Stage2(Stages12InFp32):
    """Stage 2 in bf16: a `GradBucket`.

    Gradients are made in an fp32 bucket, from which each micro-batch is reduced to the ranks that own its
    parts, during the backward. DeepSpeed's own buckets are bf16, and its host waits for the device before it
    reduces one.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._buckets: list[Tensor] = []
        """While a backward runs: the one that is filled, and under overlap_comm the one that is reduced."""
        self._reduced: Any = None
        """Event: the other bucket is reduced."""
        self._pieces: list[tuple[int, Tensor]] = []
        """Content of the bucket, in order: the rank that sums it, and where on that rank."""
        self._used = 0
        weights = [weight for group in self.bit16_groups for weight in group]
        self._bucket_size = max(self.reduce_bucket_size, *map(torch.numel, weights))
        for weight in weights:
            weight.grad_bucket = self

    def place(self, weight: Any) -> Tensor:
        """Next place in the bucket, which is reduced first if it has none left."""
        if not self._buckets:
            size, device = self._bucket_size, weight.device
            self._buckets = [torch.empty(size, device=device) for _ in range(2 if self._overlaps else 1)]
        if self._used + weight.numel() > self._bucket_size:
            self._reduce_bucket()
        return self._buckets[0].narrow(0, self._used, weight.numel()).view(weight.shape)

    def filled(self, weight: Any) -> None:
        group, number = self._get_param_group_idx(weight), self.get_param_id(weight)
        partition = self._get_compact_grad_partition_buffer(group).flat_partition
        for owner in self.param_to_partition_ids[group][number]:
            first = self.grad_start_offset[group][owner][number]
            place = self.grad_partition_insertion_offset[group][owner][number]
            count = min(weight.numel() - first, len(partition) - place)
            self._pieces.append((owner, partition.narrow(0, place, count)))
        self._used += weight.numel()

    @property
    def _overlaps(self) -> bool:
        return self.overlap_comm and self.reduction_stream is not None

    def _reduce_bucket(self) -> None:
        """Queue the reduction of the bucket, under overlap_comm beside the backward, which goes on with the
        other bucket.

        Collective: all ranks of a data-parallel group call it.
        """
        device, start = get_accelerator(), 0
        if self._overlaps:
            self.reduction_stream.wait_stream(device.current_stream())
        with device.stream(self.reduction_stream) if self._overlaps else nullcontext():
            for owner, pieces in groupby(self._pieces, key=itemgetter(0)):
                totals = [total for _, total in pieces]
                count = sum(map(len, totals))
                self._reduce(owner, self._buckets[0].narrow(0, start, count), totals)
                start += count
        if self._overlaps:
            before, self._reduced = self._reduced, self.reduction_stream.record_event()
            if before:
                device.current_stream().wait_event(before)
            self._buckets.reverse()
        self._pieces, self._used = [], 0

    def _reduce(self, owner: int, values: Tensor, totals: list[Tensor]) -> None:
        """Add the mean of `values` over ranks to the `totals` of one, which lie there one after another.

        Collective: all ranks of a data-parallel group call it.
        """
        size = dist.get_world_size(self.dp_process_group)
        sent = values.to(self.communication_data_type)
        if size > 1:
            dist.reduce(sent, group=self.dp_process_group, group_dst=owner)
        if owner == dist.get_rank(self.dp_process_group):
            for total, part in zip(totals, sent.split([len(total) for total in totals]), strict=True):
                total.add_(part, alpha=1 / size)

    @torch.no_grad()
    def process_gradients(self, param: Any, i: int) -> None:
        # by a parameter's hook, which autograd also calls where it was given no gradient
        if param.grad is not None:
            self.place(param).copy_(param.grad)
            self.filled(param)
            param.grad = None

    @torch.no_grad()
    def independent_gradient_partition_epilogue(self) -> None:
        """Reduce what is left in the bucket when a backward has ended.

        Collective: all ranks of a data-parallel group call it.
        """
        self._reduce_bucket()
        if self._overlaps:
            get_accelerator().current_stream().wait_stream(self.reduction_stream)
        self._buckets, self._reduced = [], None
        self._epilogue_ran_this_backward = True

    def _flat_gradient(self, group: int) -> Tensor:
        found = self._get_compact_grad_partition_buffer(group).flat_partition
        self.averaged_gradients[group] = None
        return found


@contextmanager
def one_pass_optimizers(precision: str) -> Iterator[None]:
    """Context in which DeepSpeed's engine builds these optimizers in place of its own."""
    theirs = deepspeed_engine.BF16_Optimizer, deepspeed_engine.DeepSpeedZeroOptimizer
    ours = Stage1, Stage2 if precision == "bf16" else Stages12InFp32
    deepspeed_engine.BF16_Optimizer, deepspeed_engine.DeepSpeedZeroOptimizer = ours
    try:
        yield
    finally:
        deepspeed_engine.BF16_Optimizer, deepspeed_engine.DeepSpeedZeroOptimizer = theirs
