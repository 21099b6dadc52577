"""`plan layout`: every layout of N GPUs, with its predicted speed or the reason against it.

Imports no torch.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from math import ceil
from typing import get_args

from llama_mcore.config.checks import check_config
from llama_mcore.config.schema import RunConfig
from llama_mcore.distributed.config import ParallelConfig
from llama_mcore.errors import ConfigError, Problem
from llama_mcore.model.config import Recompute
from llama_mcore.plan.layout.efficiency import Efficiency
from llama_mcore.plan.layout.flops import executed_flops, mfu, token_flops
from llama_mcore.plan.layout.footprint import Footprint, memory_of
from llama_mcore.plan.layout.hardware import GIB, GPUS, Gpu, Network
from llama_mcore.plan.layout.throughput import Predictor, Shape, StepTime, Work, own_traffic

TENSOR_PARALLEL = (1, 2, 4, 8, 16)
STAGES = (1, 2, 3)
MICRO_BATCHES = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 24, 32)
DAY_S = 86_400
NEAR_BATCH = 0.15
"""Largest relative change of the batch to let the ranks share it evenly."""
MOST_NODES_MORE = 64
MOST_DOUBLINGS = 10
"""Doublings of the number of GPUs beyond that, in the search for one that a layout fits."""


@dataclass(frozen=True)
class Goal:
    """Model and amount of training to plan for."""

    run: RunConfig
    """Model, and all settings that a layout leaves open."""
    tokens: float
    sequences: float
    """Sequences per step; a layout changes it by at most NEAR_BATCH."""


@dataclass(frozen=True)
class Cluster:
    """GPUs of one kind, their network, and the efficiency assumed for them."""

    gpu: Gpu
    gpus: int
    network: Network
    efficiency: Efficiency
    gpus_per_node: int = 8


@dataclass(frozen=True)
class Option:
    """A layout that is valid and fits."""

    run: RunConfig
    footprint: Footprint
    step: StepTime
    cluster: Cluster

    @property
    def tokens_per_s_per_gpu(self) -> float:
        return self.run.tokens_per_step / self.step.total / self.cluster.gpus

    @property
    def days(self) -> float:
        return self.run.train.steps * self.step.total / DAY_S

    @property
    def gpu_hours(self) -> float:
        return self.days * 24 * self.cluster.gpus

    @property
    def mfu_causal(self) -> float:
        return self._share(token_flops(self.run.model).causal)

    @property
    def mfu_full(self) -> float:
        return self._share(token_flops(self.run.model).full)

    @property
    def hfu_causal(self) -> float:
        return self._share(executed_flops(self.run.model, self.run.model.recompute).causal)

    def _share(self, flops: float) -> float:
        return mfu(self.tokens_per_s_per_gpu, flops, self.cluster.gpu.peak.bf16_flops)

    @property
    def layout(self) -> dict[str, int | str | bool]:
        run, gpus = self.run, self.cluster.gpus
        return {
            "tp": run.parallel.tp,
            "sequence_parallel": run.parallel.sequence_parallel,
            "dp": run.parallel.dp(gpus),
            "zero_stage": run.zero.stage,
            "micro_batch_size": run.train.micro_batch_size,
            "accumulation_steps": run.accumulation_steps(gpus),
            "recompute": run.model.recompute,
        }


@dataclass(frozen=True)
class Found:
    """Result of a search."""

    options: list[Option]
    """Fastest first."""
    rejected: dict[str, int]
    """Reason -> number of layouts."""


def search(goal: Goal, cluster: Cluster) -> Found:
    """Try every layout."""
    options, rejected = [], Counter[str]()
    for tp, stage, micro_batch, recompute in product(
        TENSOR_PARALLEL, STAGES, MICRO_BATCHES, get_args(Recompute)
    ):
        found = _option(goal, cluster, tp, stage, micro_batch, recompute)
        if isinstance(found, str):
            rejected[found] += 1
        else:
            run, memory = found
            options.append(Option(run, memory, step_time(run, cluster), cluster))
    options.sort(key=lambda option: (-option.tokens_per_s_per_gpu, option.footprint.total))
    return Found(options, dict(rejected.most_common()))


def _option(
    goal: Goal, cluster: Cluster, tp: int, stage: int, micro_batch: int, recompute: Recompute
) -> tuple[RunConfig, Footprint] | str:
    """Run of a layout and its memory, or the reason against it, in words that layouts share."""
    if cluster.gpus_per_node % tp:
        return f"tensor parallelism: tp must divide the {cluster.gpus_per_node} GPUs of a node"
    if cluster.gpus % tp:
        return f"tensor parallelism: tp must divide the {cluster.gpus:,} GPUs"
    batch = _nearest_batch(goal, micro_batch * ParallelConfig(tp=tp).dp(cluster.gpus))
    if abs(batch - goal.sequences) > NEAR_BATCH * goal.sequences:
        return f"batch: no multiple of micro-batch x dp is within {NEAR_BATCH:.0%} of {goal.sequences:,.0f}"
    run = _run(goal, batch, tp, stage, micro_batch, recompute)
    try:
        check_config(run, cluster.gpus)
    except ConfigError as error:
        return f"{error.problems[0].field} = {error.problems[0].value}: {error.problems[0].reason}"
    memory = memory_of(run, cluster.gpus)
    if memory.total > cluster.gpu.memory_bytes:
        return f"memory: needs more than the {cluster.gpu.memory_bytes / GIB:.0f} GiB of {cluster.gpu.name}"
    return run, memory


def _nearest_batch(goal: Goal, unit: int) -> int:
    return unit * max(1, round(goal.sequences / unit))


def _run(goal: Goal, batch: int, tp: int, stage: int, micro_batch: int, recompute: Recompute) -> RunConfig:
    run = goal.run
    steps = ceil(goal.tokens / (batch * run.model.seq_length))
    return run.changed(
        model={"recompute": recompute},
        parallel={"tp": tp, "sequence_parallel": tp > 1},
        zero={"stage": stage},
        train={
            "steps": steps,
            "global_batch_size": batch,
            "micro_batch_size": micro_batch,
            "precision": "bf16",
        },
        optim={"warmup_steps": min(run.optim.warmup_steps, steps)},
    )


def step_time(run: RunConfig, cluster: Cluster) -> StepTime:
    predictor = Predictor(cluster.gpu, cluster.network, cluster.efficiency)
    return predictor.step_time(Shape(run.model), own_work(run, cluster))


def own_work(run: RunConfig, cluster: Cluster) -> Work:
    """Work of a step of this system."""
    return Work(
        gpus=cluster.gpus,
        tp=run.parallel.tp,
        stage=run.zero.stage,
        micro_batch=run.train.micro_batch_size,
        micro_batches=run.accumulation_steps(cluster.gpus),
        recompute=run.model.recompute,
        sequence_parallel=run.parallel.sequence_parallel,
        fused=run.model.recompute != "none",
        attention=cluster.gpu.attention,
        traffic=own_traffic(cluster.gpu, run.model, run.parallel.tp, run.zero.stage),
        reduce_bytes=4 if run.zero.reduce_dtype == "fp32" else 2,
        gpus_per_node=cluster.gpus_per_node,
    )


def check_model(goal: Goal) -> None:
    """Raise ConfigError for problems that no layout changes: a model that one rank cannot train either."""
    check_config(_run(goal, 1, tp=1, stage=1, micro_batch=1, recompute="full"), world_size=1)


def nothing_fits(goal: Goal, cluster: Cluster, rejected: dict[str, int]) -> ConfigError:
    """The reasons against all layouts, and the smallest changes that make one fit."""
    remedies = [*_other_batch(goal, cluster), *_more_gpus(goal, cluster), *_other_gpu(goal, cluster)]
    remedy = (
        f"the smallest change: {' or '.join(remedies)}"
        if remedies
        else "more or other GPUs do not help: choose another model or sequence length"
    )
    problems = [Problem("ruled out", f"{count} layouts", reason) for reason, count in rejected.items()]
    asked = f"{cluster.gpus} x {cluster.gpu.name}"
    return ConfigError([Problem("--gpus", asked, "has no valid layout that fits", remedy), *problems])


def _anything_fits(goal: Goal, cluster: Cluster) -> bool:
    """True if any layout is valid and fits."""
    # micro-batch 1 and full recomputation need the least memory and let the batch be nearest to the goal's
    return any(
        not isinstance(_option(goal, cluster, tp, stage, 1, "full"), str)
        for tp, stage in product(TENSOR_PARALLEL, STAGES)
    )


def _other_batch(goal: Goal, cluster: Cluster) -> Iterator[str]:
    sizes = sorted(
        {
            _nearest_batch(goal, ParallelConfig(tp=tp).dp(cluster.gpus))
            for tp in TENSOR_PARALLEL
            if cluster.gpus % tp == 0
        },
        key=lambda size: abs(size - goal.sequences),
    )
    for size in sizes:
        if _anything_fits(replace(goal, sequences=size), cluster):
            # in units of 1,024 tokens, as the option reads them; half a unit is far within NEAR_BATCH
            yield f"--global-batch-tokens {ceil(size * goal.run.model.seq_length / 1024)}K"
            return


def _more_gpus(goal: Goal, cluster: Cluster) -> Iterator[str]:
    node = cluster.gpus_per_node
    part_of_node = range(cluster.gpus + 1, node)
    nodes = [node * (cluster.gpus // node + more) for more in range(1, MOST_NODES_MORE + 1)]
    doubled = [nodes[-1] * 2**doublings for doublings in range(1, MOST_DOUBLINGS + 1)]
    for gpus in (*part_of_node, *nodes, *doubled):
        if _anything_fits(goal, replace(cluster, gpus=gpus)):
            yield f"--gpus {gpus}"
            return


def _other_gpu(goal: Goal, cluster: Cluster) -> Iterator[str]:
    for gpu in sorted(GPUS.values(), key=lambda gpu: gpu.memory_bytes):
        if _anything_fits(goal, replace(cluster, gpu=gpu, network=gpu.network)):
            yield f"--gpu {gpu.name}"
            return
