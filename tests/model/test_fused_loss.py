"""The fused loss against logits held whole and torch's cross-entropy."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from llama_mcore.distributed.config import ParallelConfig
from llama_mcore.distributed.groups import process_groups
from llama_mcore.distributed.tp_comm import TensorParallel
from llama_mcore.model import fused_loss as loss_module
from llama_mcore.model.cross_entropy import BY_PASSES
from llama_mcore.model.fused_loss import linear_cross_entropy
from llama_mcore.model.kernels import PLAIN, Kernels
from llama_mcore.model.loss_chunk import loss_chunk_rows
from llama_mcore.model.parameters import TpSplit
from llama_mcore.model.sharding import shard, unshard
from tests.support.world import run_ranks

S, B, H, V = 12, 3, 16, 40
ROWS_PER_CHUNK = 5  # does not divide S * B
KERNELS = {"by softmax": PLAIN, "by passes": replace(PLAIN, cross_entropy=BY_PASSES)}


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(S, B, H, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(V, H, generator=generator, dtype=torch.float64).to(dtype)
    labels = torch.randint(V, (B, S), generator=generator)
    mask = (torch.rand(B, S, generator=generator) > 0.3).float()
    return hidden, weight, labels, mask


def plain(hidden: Tensor, weight: Tensor, labels: Tensor, mask: Tensor | None) -> list[Tensor]:
    """Loss and gradients from whole logits."""
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    logits = (hidden @ weight.t()).transpose(0, 1).flatten(0, 1)
    losses = F.cross_entropy(logits, labels.flatten(), reduction="none")
    mask = torch.ones(B * S) if mask is None else mask.flatten()
    mean = (losses * mask).sum() / mask.sum()
    (3 * mean).backward()
    return [mean.detach(), hidden.grad, weight.grad]


def fused(
    hidden: Tensor, weight: Tensor, labels: Tensor, mask: Tensor | None, tp: TensorParallel, kernels: Kernels
) -> list[Tensor]:
    """The same from this rank's shards, put together again."""
    rank = tp.rank if tp.sequence_parallel else 0
    part = hidden.chunk(tp.size if tp.sequence_parallel else 1)[rank].clone().requires_grad_()
    rows = shard(weight, TpSplit(0), tp.rank, tp.size).clone().requires_grad_()
    mean = linear_cross_entropy(part, rows, labels, mask, tp, kernels)
    (3 * mean).backward()
    grad_hidden = _gather(part.grad, tp) if tp.sequence_parallel else part.grad
    return [mean.detach(), grad_hidden, _gather(rows.grad, tp)]


def _gather(x: Tensor, tp: TensorParallel) -> Tensor:
    every = [torch.empty_like(x) for _ in range(tp.size)]
    dist.all_gather(every, x.contiguous(), group=tp.group)
    return unshard(every, TpSplit(0))


def compare(tp: TensorParallel, kernels: Kernels) -> None:
    """fp32 to 1e-6 of the largest value: sums of a few dozen products; float64 to 1e-13."""
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.float64, 1e-13)):
        hidden, weight, labels, mask = inputs(dtype)
        for chosen in (None, mask, torch.zeros_like(mask).index_fill_(1, torch.tensor([2]), 1.0)):
            expected = plain(hidden, weight, labels, chosen)
            found = fused(hidden, weight, labels, chosen, tp, kernels)
            for name, ours, theirs in zip(("loss", "hidden", "weight"), found, expected, strict=True):
                error = (ours - theirs).abs().max() / theirs.abs().max()
                assert error < tolerance, (name, dtype, tp.size, tp.sequence_parallel, float(error))


def in_chunks_of(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "loss_chunk_rows", lambda tokens, *_, **__: min(tokens, rows))


@pytest.mark.parametrize("rows", [ROWS_PER_CHUNK, S * B])
@pytest.mark.parametrize("kernels", KERNELS)
def test_one_process(rows: int, kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    in_chunks_of(rows, monkeypatch)
    with process_groups(ParallelConfig(), seed=0) as groups:
        compare(TensorParallel(groups.tp_group, sequence_parallel=False), KERNELS[kernels])


@pytest.mark.process
@pytest.mark.parametrize("ranks", [2, 4])
def test_tensor_parallel(ranks: int) -> None:
    run_ranks(ranks, compare_on_ranks, ranks)


def compare_on_ranks(size: int) -> None:
    with process_groups(ParallelConfig(tp=size), seed=0) as job, pytest.MonkeyPatch.context() as patch:
        in_chunks_of(ROWS_PER_CHUNK, patch)
        for split in (False, True):
            for kernels in KERNELS.values():
                compare(TensorParallel(job.tp_group, sequence_parallel=split), kernels)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("rows", [ROWS_PER_CHUNK, S * B])
def test_bf16_rounds_logits_and_their_gradients_alone(
    rows: int, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against fp64: a logit below 16 is off by 2^-5 at most, so a loss by 2^-4 and a probability by 2^-4 of
    itself; the terms of a gradient's sums differ in sign."""
    in_chunks_of(rows, monkeypatch)
    hidden, weight, labels, mask = inputs(torch.bfloat16)
    assert (hidden @ weight.t()).abs().max() < 16
    expected = plain(hidden.double(), weight.double(), labels, mask)
    with process_groups(ParallelConfig(), seed=0) as groups:
        tp = TensorParallel(groups.tp_group, sequence_parallel=False)
        found = fused(hidden, weight, labels, mask, tp, KERNELS[kernels])
    assert [x.dtype for x in found] == [torch.float32, torch.bfloat16, torch.bfloat16]
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.double() - theirs).abs().max() / theirs.abs().max() < 2**-4


def test_a_weight_that_has_a_sum_gets_its_gradient_there(monkeypatch: pytest.MonkeyPatch) -> None:
    in_chunks_of(ROWS_PER_CHUNK, monkeypatch)
    hidden, weight, labels, mask = inputs(torch.bfloat16)
    weight.requires_grad_()
    weight.main_grad = torch.ones(V, H)
    with process_groups(ParallelConfig(), seed=0) as groups:
        tp = TensorParallel(groups.tp_group, sequence_parallel=False)
        linear_cross_entropy(hidden, weight, labels, mask, tp).backward()
        assert weight.grad is None
        found = weight.main_grad - 1
        del weight.main_grad
        linear_cross_entropy(hidden, weight, labels, mask, tp).backward()
    torch.testing.assert_close(found.bfloat16(), weight.grad, rtol=2**-7, atol=1e-6)


def test_logits_are_never_held_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    in_chunks_of(ROWS_PER_CHUNK, monkeypatch)
    hidden, weight, labels, _ = inputs(torch.bfloat16)
    with process_groups(ParallelConfig(), seed=0) as groups, _Largest() as largest:
        tp = TensorParallel(groups.tp_group, sequence_parallel=False)
        mean = linear_cross_entropy(hidden.requires_grad_(), weight.requires_grad_(), labels, None, tp)
        mean.backward()
    assert mean.dtype == torch.float32
    assert largest.numel == max(V * H, S * B * H, V * ROWS_PER_CHUNK) < S * B * V


# tokens, vocabulary of a rank, on a GPU -> rows
CHUNKS = [
    (4096, 32_000, True, 4096),
    (8192, 32_000, True, 4096),
    (8192, 32_000, False, 512),
    (8192, 128_256, True, 1024),
    (8192, 128_256, False, 128),
    (100, 32_000, True, 100),
    (8192, 250_000, False, 67),
    (8192, 10**9, False, 1),
]


@pytest.mark.parametrize(("tokens", "vocabulary", "on_gpu", "rows"), CHUNKS)
def test_rows_of_a_chunk(tokens: int, vocabulary: int, on_gpu: bool, rows: int) -> None:
    assert loss_chunk_rows(tokens, vocabulary, on_gpu=on_gpu) == rows


def test_without_gradients_none_are_computed() -> None:
    hidden, weight, labels, _ = inputs(torch.float32)
    with process_groups(ParallelConfig(), seed=0) as groups, torch.no_grad(), _Largest() as largest:
        tp = TensorParallel(groups.tp_group, sequence_parallel=False)
        mean = linear_cross_entropy(hidden, weight.requires_grad_(), labels, None, tp)
    assert not mean.requires_grad
    assert largest.gemms == 1


class _Largest(TorchDispatchMode):
    """Size of the largest tensor that any operation returned, and the number of matrix products."""

    numel = 0
    gemms = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.numel = max(self.numel, result.numel())
        self.gemms += "mm" in function.__name__
        return result
