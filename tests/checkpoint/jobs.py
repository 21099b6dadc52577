"""Save on many layouts, and load each of these checkpoints on many others.

A job that saves trains three steps and saves to FOLDER/NAME; one that loads does so and saves again to
FOLDER/SAVED--LOADED. Both then take two steps more, and write their losses and gradient norms to NAME.json.
"""

import itertools
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from llama_mcore.checkpoint import loader as loading
from llama_mcore.checkpoint.loader import load_checkpoint
from llama_mcore.checkpoint.paths import checkpoints_dir
from llama_mcore.checkpoint.reader import CheckpointReader
from llama_mcore.checkpoint.run_dir import find_checkpoint
from llama_mcore.checkpoint.saver import save_checkpoint
from llama_mcore.checkpoint.train_state import TrainState
from llama_mcore.config.schema import RunConfig
from llama_mcore.data.loader import MicroBatch
from llama_mcore.distributed.groups import Groups, model_parallel_groups
from llama_mcore.errors import OutputError
from llama_mcore.model.build import build_model
from llama_mcore.train.engine import DeepSpeedEngine, build_engine, dtype_of
from llama_mcore.train.step import train_step
from tests.support.models import UNEVEN, run_config
from tests.support.world import run_ranks

SEQUENCES, SEQ_LENGTH, VOCAB = 4, UNEVEN["seq_length"], UNEVEN["vocab_size"]
STEPS = 3
RANKS_TIMEOUT_S = 3600
"""Sixteen ranks share two cores, and load 36 checkpoints each."""


@dataclass(frozen=True)
class Job:
    name: str
    tp: int
    dp: int
    stage: int
    precision: str = "fp32"

    @property
    def world_size(self) -> int:
        return self.tp * self.dp

    def run_config(self, folder: Path, name: str | None = None) -> RunConfig:
        """A run under FOLDER/NAME; without `name`, that of the job."""
        return run_config(
            folder / (name or self.name),
            UNEVEN,
            parallel={"tp": self.tp, "sequence_parallel": True},
            zero={"stage": self.stage},
            train={"micro_batch_size": SEQUENCES // self.dp, "precision": self.precision},
        )


def layout(tp: int, dp: int, stage: int, precision: str = "fp32") -> Job:
    suffix = "" if precision == "fp32" else f"-{precision}"
    return Job(f"tp{tp}-dp{dp}-zero{stage}{suffix}", tp, dp, stage, precision)


@dataclass(frozen=True)
class Pair:
    saved: Job
    loaded: Job

    @property
    def name(self) -> str:
        return f"{self.saved.name}--{self.loaded.name}"


A, B = Job("a", tp=2, dp=1, stage=1), Job("b", tp=1, dp=2, stage=3, precision="bf16")
SAVED = [A, layout(1, 2, 0), layout(4, 1, 2), layout(1, 4, 3)]
LOADED = [
    layout(1, 1, 1),
    layout(1, 2, 3),
    layout(2, 1, 0),
    layout(4, 1, 3),
    layout(1, 4, 1),
    layout(2, 2, 2),
]
SAVED_BF16 = [B, layout(1, 2, 1, "bf16"), layout(1, 2, 2, "bf16")]
LOADED_BF16 = [layout(1, 1, 1, "bf16"), layout(2, 1, 2, "bf16"), layout(2, 2, 1, "bf16")]
SAME_LAYOUT = [Pair(job, job) for job in (*SAVED, *SAVED_BF16)]
OTHER_LAYOUT = [
    *itertools.starmap(Pair, itertools.product(SAVED, LOADED)),
    *itertools.starmap(Pair, itertools.product([B], LOADED_BF16)),
]
SAMPLE = [*SAME_LAYOUT, *OTHER_LAYOUT]
"""Every value of every dimension on both sides, and both directions of each."""

EVERY_JOB = list(itertools.starmap(layout, itertools.product((1, 2, 4), (1, 2, 4), (0, 1, 2, 3))))
EVERY = list(itertools.starmap(Pair, itertools.product(EVERY_JOB, repeat=2)))


def save_and_load(folder: Path, pairs: list[Pair]) -> None:
    on_each({pair.saved for pair in pairs}, partial(save, folder))
    on_each({pair.loaded for pair in pairs}, partial(load, folder, pairs))
    on_each([A], partial(refuse, folder))


def on_each(jobs: Iterable[Job], work: Callable[[Job, Groups], None]) -> None:
    """Call `work` for each job on as many ranks as it has, forked for it: groups of a job before would leave
    hundreds of threads."""
    for job in sorted(jobs, key=lambda job: (job.world_size, job.name)):
        run_ranks(job.world_size, on_rank, job, work, timeout_s=RANKS_TIMEOUT_S)


def on_rank(job: Job, work: Callable[[Job, Groups], None]) -> None:
    dist.init_process_group("gloo")
    with model_parallel_groups(job.run_config(Path()).parallel, 0, torch.device("cpu")) as groups:
        work(job, groups)
    dist.barrier()
    dist.destroy_process_group()


def save(folder: Path, job: Job, groups: Groups) -> None:
    run = job.run_config(folder)
    engine = new_engine(run, groups)
    take_steps(engine, range(STEPS), job.dp, groups)
    state = TrainState(STEPS, STEPS * SEQUENCES)
    save_checkpoint(engine, run, state, groups)
    if groups.rank == 0:
        leave_interrupted(checkpoints_dir(Path(run.run.dir)))
    save_checkpoint(engine, run, state, groups)  # the same step again replaces the first
    go_on(engine, job, folder / f"{job.name}.json", groups)


def load(folder: Path, pairs: list[Pair], job: Job, groups: Groups) -> None:
    """Load the pairs in turn into one engine; the job's own layout goes first, into a new engine."""
    loading.SLOT = 1000  # elements: most parameters have more
    engine = new_engine(job.run_config(folder), groups)
    todo = [pair for pair in pairs if pair.loaded == job]
    for pair in sorted(todo, key=lambda pair: pair.saved != job):
        reader = CheckpointReader(find_checkpoint(folder / pair.saved.name))
        load_checkpoint(engine, reader, groups)
        save_checkpoint(engine, job.run_config(folder, pair.name), reader.state, groups)
        go_on(engine, job, folder / f"{pair.name}.json", groups)


def go_on(engine: DeepSpeedEngine, job: Job, file: Path, groups: Groups) -> None:
    following = take_steps(engine, range(STEPS, STEPS + 2), job.dp, groups)
    if groups.rank == 0:
        file.write_text(json.dumps(following))


def leave_interrupted(folder: Path) -> None:
    """Leave what a kill leaves in the middle of a save, and of the removal of this job's own step."""
    for name in ("step-00000007.tmp", f"step-{STEPS:08d}.removed.tmp"):
        (folder / name).mkdir(parents=True)
        (folder / name / "rank-00000.safetensors").touch()


def refuse(folder: Path, job: Job, groups: Groups) -> None:
    """Save where a file stands in the way; every rank must learn of it."""
    run = job.run_config(folder / "refused")
    in_the_way = checkpoints_dir(Path(run.run.dir))
    if groups.rank == 0:
        in_the_way.parent.mkdir(parents=True)
        in_the_way.touch()
    engine = new_engine(run, groups)
    take_steps(engine, range(1), job.dp, groups)
    try:
        save_checkpoint(engine, run, TrainState(1, 4), groups)
    except OutputError as error:
        (folder / f"refused-{groups.rank}.txt").write_text(str(error))


def new_engine(run: RunConfig, groups: Groups) -> DeepSpeedEngine:
    model = build_model(run.model, run.parallel, groups, dtype_of(run.train), run.run.seed)
    return build_engine(model, run.zero, run.train, run.optim, groups)


def take_steps(
    engine: DeepSpeedEngine,
    steps: range,
    dp: int,
    groups: Groups,
    before_update: Callable[[], None] = lambda: None,
) -> list[tuple[float, float]]:
    """(loss, gradient norm) of each step."""
    found = [
        train_step(engine, [batch(step, dp, groups.dp_rank)], 1e-2, groups, before_update=before_update)
        for step in steps
    ]
    return [(result.loss, result.grad_norm) for result in found]


def batch(step: int, dp: int, dp_rank: int) -> MicroBatch:
    """Sequences of a step that this rank reads; those of all ranks are the same under every layout."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(VOCAB, (SEQUENCES, SEQ_LENGTH + 1), generator=generator).chunk(dp)[dp_rank]
    return MicroBatch(tokens[:, :-1], tokens[:, 1:])
