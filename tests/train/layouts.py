"""The same five steps under every layout of a world size, and in one process of plain torch."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from llama_mcore.config.schema import RunConfig
from llama_mcore.data.loader import MicroBatch
from llama_mcore.distributed.config import ParallelConfig
from llama_mcore.distributed.groups import Groups, model_parallel_groups, process_groups
from llama_mcore.model import rmsnorm
from llama_mcore.model.build import build_model
from llama_mcore.model.sharding import split_of, unshard
from llama_mcore.train.engine import build_engine, full_fp32_weight
from llama_mcore.train.optim import build_optimizer
from llama_mcore.train.step import train_step
from tests.support.models import GROUPED, run_config

STEPS = 5
SEQUENCES = 4
LR = 1e-3


@dataclass(frozen=True)
class Layout:
    tp: int
    dp: int
    sequence_parallel: bool
    stage: int
    accumulation: int
    recompute: str = "none"
    qk_norm: bool = False

    @property
    def world_size(self) -> int:
        return self.tp * self.dp

    @property
    def name(self) -> str:
        sp = "sp" if self.sequence_parallel else "nosp"
        return f"tp{self.tp}-{sp}-zero{self.stage}-dp{self.dp}-acc{self.accumulation}-{self.recompute}"

    def run_config(self) -> RunConfig:
        return run_config(
            Path("unused"),
            GROUPED,
            model={"recompute": self.recompute, "qk_norm": self.qk_norm},
            parallel={"tp": self.tp, "sequence_parallel": self.sequence_parallel},
            zero={"stage": self.stage},
            train={
                "steps": STEPS,
                "micro_batch_size": SEQUENCES // (self.dp * self.accumulation),
                "global_batch_size": SEQUENCES,
            },
            optim={"lr": LR},
        )


def layouts(world_size: int) -> list[Layout]:
    """Every layout that uses exactly `world_size` ranks; those that accumulate under each recomputation."""
    grid = itertools.product((1, 2), (1, 2), (False, True), (0, 1, 2, 3), (1, 2))
    fits = [
        Layout(tp, dp, sp, stage, accumulation)
        for tp, dp, sp, stage, accumulation in grid
        if tp * dp == world_size and (tp > 1 or not sp)
    ]
    recomputed = [
        Layout(layout.tp, layout.dp, layout.sequence_parallel, layout.stage, layout.accumulation, recompute)
        for layout in fits
        for recompute in ("selective", "full")
        if layout.accumulation == 2
    ]
    return fits + recomputed


@dataclass(frozen=True)
class Trained:
    losses: list[float]
    grad_norms: list[float]
    weights: dict[str, np.ndarray]
    """Final full weights."""
    differing: list[str]
    """Replicated parameters that are not bitwise equal on all ranks of a tensor-parallel group."""


def train_layouts(todo: Sequence[Layout]) -> dict[str, Trained]:
    """Train the layouts; return the results by name. Called by all ranks."""
    found = {}
    dist.init_process_group("gloo")
    for tp in sorted({layout.tp for layout in todo}):
        # Once: the threads of groups stay, and hundreds of them take all of a machine.
        with model_parallel_groups(ParallelConfig(tp=tp), 0, torch.device("cpu")) as groups:
            found |= {layout.name: train_layout(layout, groups) for layout in todo if layout.tp == tp}
    dist.barrier()
    dist.destroy_process_group()
    return found


def train_without_norm_sum(layout: Layout) -> Trained:
    """The defect that sequence parallelism has where the gradients of norm weights are not added up."""
    with patch.object(rmsnorm, "copy_to_tensor_model_parallel_region", lambda weight: weight):
        return train_layouts([layout])[layout.name]


def train_layout(layout: Layout, groups: Groups) -> Trained:
    run = layout.run_config()
    model = build_model(run.model, run.parallel, groups, torch.float32, run.run.seed)
    engine = build_engine(model, run.zero, run.train, run.optim, groups)
    results = [train_step(engine, batches, LR, groups) for batches in steps_of(layout, groups.dp_rank)]
    return trained([r.loss for r in results], [r.grad_norm for r in results], model, groups)


def train_reference(qk_norm: bool = False) -> Trained:
    """Train in one process with plain torch: no DeepSpeed, no accumulation."""
    layout = Layout(1, 1, False, 0, 1, qk_norm=qk_norm)
    run = layout.run_config()
    losses, norms = [], []
    with process_groups(run.parallel, seed=0) as groups:
        model = build_model(run.model, run.parallel, groups, torch.float32, run.run.seed)
        optimizer = build_optimizer(model, run.optim)
        for (batch,) in steps_of(layout, 0):
            loss = model(batch.tokens, labels=batch.labels)
            loss.backward()
            norms.append(nn.utils.clip_grad_norm_(model.parameters(), run.optim.clip_grad).item())
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return trained(losses, norms, model, groups)


def steps_of(layout: Layout, dp_rank: int, first: int = 0, end: int = STEPS) -> Iterator[list[MicroBatch]]:
    """Micro-batches of each step on one data-parallel rank; a step has the same sequences in every layout."""
    for step in range(first, end):
        tokens = torch.randint(512, (SEQUENCES, 33), generator=torch.Generator().manual_seed(step))
        parts = tokens.chunk(layout.dp * layout.accumulation)[dp_rank :: layout.dp]
        yield [MicroBatch(part[:, :-1], part[:, 1:]) for part in parts]


def trained(losses: list[float], norms: list[float], model: nn.Module, groups: Groups) -> Trained:
    """All ranks call it together; rank 0's is told."""
    full: dict[str, np.ndarray] = {}
    differing = []
    for name, parameter in model.named_parameters():
        weight = full_fp32_weight(parameter).contiguous()
        shards = [torch.empty_like(weight) for _ in range(groups.tp_size)]
        dist.all_gather(shards, weight, group=groups.tp_group)
        cut = split_of(name)
        if groups.rank == 0:
            full[name] = as_numpy(unshard(shards, cut))
        if cut is None and not all(torch.equal(shards[0], other) for other in shards):
            differing.append(name)
    return Trained(losses, norms, full, differing)


def as_numpy(weight: Tensor) -> np.ndarray:
    return weight.detach().clone().numpy()
