"""Workload of the contenders, and those that train as the product does, with our layer or megatron-core's.

All take the same batches and settings: bf16, AdamW, gradients clipped to norm 1, weight decay 0.1. These run
under ZeRO-1 with fp32 masters, fp32 accumulation and fp32 Adam moments; peers.py has the others.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from llama_mcore.config.schema import RunConfig
from llama_mcore.data.loader import MicroBatch
from llama_mcore.distributed.groups import Groups
from llama_mcore.model.build import build_model, mcore_layer
from llama_mcore.model.config import ModelConfig
from llama_mcore.train.engine import build_engine, dtype_of
from llama_mcore.train.step import mean_loss, train_step


@dataclass(frozen=True)
class Workload:
    """Inputs of every contender."""

    run: RunConfig
    groups: Groups
    batches: Sequence[MicroBatch]
    """Micro-batches of a step."""


class Contender(Protocol):
    """A model on the device: ready for forward and backward, after `add_optimizer` for whole steps."""

    @property
    def states(self) -> str:
        """Precision of weights / gradients / Adam's moments / masters."""

    @property
    def eager(self) -> bool:
        """All that it keeps for the backward passes autograd's hooks, where its bytes can be counted."""

    @property
    def module(self) -> nn.Module: ...

    def loss(self) -> Tensor:
        """Mean loss of the first micro-batch, with the graph of the backward."""

    def add_optimizer(self) -> None: ...

    def step(self) -> None:
        """Forward and backward of every micro-batch, clipping, update; gradients are dropped."""

    def close(self) -> None:
        """Release what would otherwise outlive this object."""


class McoreContender:
    """A model of this package, under the product's own training step."""

    states = "bf16 / fp32 / fp32 / fp32"
    eager = True

    def __init__(self, workload: Workload, *, own_layer: bool = True, **changes: str) -> None:
        """`own_layer`: ours, not megatron-core's; `changes` of the run's model section: recompute."""
        self.workload = workload
        model = workload.run.model.model_copy(update=changes)
        self.run = workload.run.model_copy(update={"model": model})
        self.module = build_model(
            *(model, self.run.parallel, workload.groups, dtype_of(self.run.train), self.run.run.seed),
            layer=None if own_layer else mcore_layer(),
        )

    def loss(self) -> Tensor:
        return mean_loss(self.module, self.workload.batches[0], self.workload.groups)

    def add_optimizer(self) -> None:
        run = self.run
        self.engine = build_engine(self.module, run.zero, run.train, run.optim, self.workload.groups)

    def step(self) -> None:
        train_step(self.engine, self.workload.batches, self.run.optim.lr, self.workload.groups)

    def close(self) -> None:
        if hasattr(self, "engine"):
            self.engine.destroy()


def random_batch(model: ModelConfig, micro_batch_size: int, seed: int) -> MicroBatch:
    """Random tokens: on zeros a GPU draws less power and runs faster than on text."""
    generator = torch.Generator().manual_seed(seed)
    shape = (micro_batch_size, model.seq_length + 1)
    ids = torch.randint(model.vocab_size, shape, generator=generator)
    return MicroBatch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())


def benchmark_run(model: ModelConfig, micro_batch_size: int, accumulation: int = 1) -> RunConfig:
    """A run of `accumulation` micro-batches a step on one device; it reads no data and writes nothing."""
    return RunConfig.model_validate(
        {
            "run": {"dir": "unused"},
            "model": model,
            "zero": {"stage": 1},
            "data": {"train": "unused"},
            "train": {
                "steps": 1,
                "micro_batch_size": micro_batch_size,
                "global_batch_size": micro_batch_size * accumulation,
            },
            "optim": {"lr": 1e-4, "warmup_steps": 0},
        }
    )


def workload_of(run: RunConfig, groups: Groups) -> Workload:
    """Random micro-batches of one step, each with tokens of its own."""
    size, seed = run.train.micro_batch_size, run.run.seed
    batches = [random_batch(run.model, size, seed + n) for n in range(run.train.accumulation_steps(1))]
    return Workload(run, groups, batches)
