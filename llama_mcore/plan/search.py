"""`plan layout`: every layout that N GPUs allow, what rules one out, and how fast the others are. Pure
Python."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from math import ceil
from typing import get_args

from llama_mcore.config import RunConfig, check_run
from llama_mcore.errors import ConfigError, Problem
from llama_mcore.model.config import Recompute
from llama_mcore.plan.efficiency import Efficiency
from llama_mcore.plan.flops import executed_flops, mfu, token_flops
from llama_mcore.plan.footprint import Footprint, memory_of
from llama_mcore.plan.hardware import DEFAULT_NETWORK, GIB, GPUS, Gpu, Network, network
from llama_mcore.plan.throughput import Predictor, StepTime, Work, shape_of

STAGES = (1, 2, 3)
MICRO_BATCHES = (1, 2, 4, 8, 16, 32)
DAY_S = 86_400
NEAR_BATCH = 0.05
MOST_DOUBLINGS = 10
"""Of the number of GPUs, in the search for the smallest change after which something fits."""


@dataclass(frozen=True)
class Cluster:
    gpu: Gpu
    gpus: int
    network: Network
    efficiency: Efficiency
    gpus_per_node: int = 8


@dataclass(frozen=True)
class Option:
    """A layout that runs and fits."""

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
            "dp": run.data_parallel_size(gpus),
            "zero_stage": run.zero.stage,
            "micro_batch_size": run.train.micro_batch_size,
            "accumulation_steps": run.accumulation_steps(gpus),
            "recompute": run.model.recompute,
        }


@dataclass(frozen=True)
class Found:
    options: list[Option]
    """Fastest first."""
    rejected: dict[str, int]
    """Reason -> layouts."""


def search(base: RunConfig, cluster: Cluster) -> Found:
    """`base` gives model, tokens, batch and all that a layout leaves open."""
    options, rejected = [], Counter[str]()
    for run in _candidates(base, cluster):
        if reason := _cannot_run(run, cluster):
            rejected[reason] += 1
            continue
        memory = memory_of(run, cluster.gpus)
        if memory.total > cluster.gpu.memory_bytes:
            rejected[
                f"memory: needs more than the {cluster.gpu.memory_bytes / GIB:.0f} GiB of {cluster.gpu.name}"
            ] += 1
            continue
        options.append(Option(run, memory, step_time(run, cluster), cluster))
    options.sort(key=lambda option: (-option.tokens_per_s_per_gpu, option.footprint.total))
    return Found(options, dict(rejected.most_common()))


def with_tokens(base: RunConfig, tokens: float, batch_tokens: float, cluster: Cluster) -> RunConfig:
    """`base` with so many steps of about so large a batch."""
    batch = _even_batch(batch_tokens / base.model.seq_length, cluster)
    steps = ceil(tokens / (batch * base.model.seq_length))
    train = base.train.model_copy(update={"steps": steps, "global_batch_size": batch, "precision": "bf16"})
    optim = base.optim.model_copy(update={"warmup_steps": min(base.optim.warmup_steps, steps)})
    return base.model_copy(update={"train": train, "optim": optim})


def _even_batch(sequences: float, cluster: Cluster) -> int:
    """Sequences near that number which the GPUs share evenly, in as large powers of two each as 5 % allow;
    else which the nodes share."""
    powers = (2**power for power in range(5, -1, -1))
    for unit in (cluster.gpus * power for power in powers):
        batch = unit * round(sequences / unit)
        if abs(batch - sequences) <= NEAR_BATCH * sequences:
            return batch
    nodes = ceil(cluster.gpus / cluster.gpus_per_node)
    return nodes * max(1, round(sequences / nodes))


def step_time(run: RunConfig, cluster: Cluster) -> StepTime:
    work = Work(
        gpus=cluster.gpus,
        tp=run.parallel.tp,
        stage=run.zero.stage,
        micro_batch=run.train.micro_batch_size,
        micro_batches=run.accumulation_steps(cluster.gpus),
        recompute=run.model.recompute,
        sequence_parallel=run.parallel.sequence_parallel,
        reduce_bytes=4 if run.zero.reduce_dtype == "fp32" else 2,
        gpus_per_node=cluster.gpus_per_node,
    )
    return Predictor(cluster.gpu, cluster.network, cluster.efficiency).step_time(shape_of(run.model), work)


def _candidates(base: RunConfig, cluster: Cluster) -> Iterator[RunConfig]:
    sizes = [2**power for power in range(5) if 2**power <= cluster.gpus]
    for tp, stage, micro_batch, recompute in product(sizes, STAGES, MICRO_BATCHES, get_args(Recompute)):
        yield base.model_copy(
            update={
                "model": base.model.model_copy(update={"recompute": recompute}),
                "parallel": base.parallel.model_copy(update={"tp": tp, "sequence_parallel": tp > 1}),
                "zero": base.zero.model_copy(update={"stage": stage}),
                "train": base.train.model_copy(update={"micro_batch_size": micro_batch}),
            }
        )


def _cannot_run(run: RunConfig, cluster: Cluster) -> str:
    """The first reason, in words that layouts share; empty if there is none."""
    if run.parallel.tp > cluster.gpus_per_node or cluster.gpus_per_node % run.parallel.tp:
        return f"tensor parallelism: tp must divide the {cluster.gpus_per_node} GPUs of a node"
    try:
        check_run(run, cluster.gpus)
    except ConfigError as error:
        problem = error.problems[0]
        if problem.field == "train.global_batch_size":
            return "batch: the global batch must be a multiple of micro-batch x dp"
        return f"{problem.field} = {problem.value}: {problem.bound}"
    return ""


def nothing_fits(base: RunConfig, cluster: Cluster, rejected: dict[str, int]) -> ConfigError:
    """What rules layouts out, and the smallest change after which one fits."""
    remedies = [*_more_gpus(base, cluster), *_other_gpu(base, cluster)]
    remedy = (
        f"the smallest change: {' or '.join(remedies)}"
        if remedies
        else "no number of GPUs of a known kind changes that: choose another model or batch"
    )
    problems = [Problem("ruled out", f"{count} layouts", reason) for reason, count in rejected.items()]
    asked = f"{cluster.gpus} x {cluster.gpu.name}"
    return ConfigError([Problem("--gpus", asked, "no layout runs and fits", remedy), *problems])


def _more_gpus(base: RunConfig, cluster: Cluster) -> Iterator[str]:
    for doublings in range(1, MOST_DOUBLINGS + 1):
        gpus = cluster.gpus * 2**doublings
        if search(base, _changed(cluster, gpus=gpus)).options:
            yield f"--gpus {gpus}"
            return


def _other_gpu(base: RunConfig, cluster: Cluster) -> Iterator[str]:
    for gpu in sorted(GPUS.values(), key=lambda gpu: gpu.memory_bytes):
        other = _changed(cluster, gpu=gpu, network=network(DEFAULT_NETWORK[gpu.name]))
        if search(base, other).options:
            yield f"--gpu {gpu.name}"
            return


def _changed(cluster: Cluster, **fields: object) -> Cluster:
    return Cluster(**(vars(cluster) | fields))
