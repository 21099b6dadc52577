"""Worker: save and load on many layouts of two ranks, then one, then four.

    python tests/checkpoint/jobs.py FOLDER

A job starts anew and trains three steps, or loads what another job saved. It saves to FOLDER/NAME, takes two
steps more, and writes their losses and gradient norms to FOLDER/NAME.json.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from llama_mcore.checkpoint.layout import checkpoints_dir, find_checkpoint
from llama_mcore.checkpoint.load import load_checkpoint
from llama_mcore.checkpoint.reader import CheckpointReader
from llama_mcore.checkpoint.save import save_checkpoint
from llama_mcore.config import RunConfig
from llama_mcore.data.loader import MicroBatch
from llama_mcore.errors import OutputError
from llama_mcore.model.build import build_model
from llama_mcore.parallel.groups import Groups, model_parallel_groups
from llama_mcore.train.engine import DeepSpeedEngine, build_engine, dtype_of
from llama_mcore.train.state import TrainState
from llama_mcore.train.step import train_step
from tests.forked import run_ranks

SHARD_ALL = str(Path(__file__).parents[1] / "train/zero3_shard_all.json")
SEQUENCES, SEQ_LENGTH, VOCAB = 4, 8, 90
STEPS = 3


@dataclass(frozen=True)
class Job:
    name: str
    tp: int
    dp: int
    stage: int
    precision: str = "fp32"
    load: str | None = None
    """Name of the job whose checkpoint this one starts from."""

    def run_config(self, folder: Path) -> RunConfig:
        return RunConfig.model_validate(
            {
                "run": {"dir": str(folder / self.name)},
                # Odd sizes, so that ZeRO has to pad
                "model": {
                    "num_layers": 2,
                    "hidden_size": 25,
                    "num_attention_heads": 4,
                    "num_query_groups": 2,
                    "head_dim": 6,
                    "ffn_hidden_size": 34,
                    "vocab_size": VOCAB,
                    "seq_length": SEQ_LENGTH,
                },
                "parallel": {"tp": self.tp, "sequence_parallel": True},
                "zero": {"stage": self.stage, "config": SHARD_ALL if self.stage == 3 else None},
                "data": {"train": "unused"},
                "train": {
                    "steps": 10,
                    "micro_batch_size": SEQUENCES // self.dp,
                    "global_batch_size": SEQUENCES,
                    "precision": self.precision,
                },
                "optim": {"lr": 1e-2, "warmup_steps": 0},
            }
        )


JOBS = [
    Job("a", tp=2, dp=1, stage=1),
    Job("b", tp=1, dp=2, stage=3, precision="bf16"),
    # The same layout again
    Job("zero0", tp=1, dp=2, stage=0),
    Job("zero0-again", tp=1, dp=2, stage=0, load="zero0"),
    Job("zero1", tp=1, dp=2, stage=1, precision="bf16"),
    Job("zero1-again", tp=1, dp=2, stage=1, precision="bf16", load="zero1"),
    Job("zero2", tp=1, dp=2, stage=2, precision="bf16"),
    Job("zero2-again", tp=1, dp=2, stage=2, precision="bf16", load="zero2"),
    Job("b-again", tp=1, dp=2, stage=3, precision="bf16", load="b"),
    # Other layouts, on two ranks, one and four
    Job("a-tp1-dp2-zero3", tp=1, dp=2, stage=3, load="a"),
    Job("a-tp1-dp2-zero0", tp=1, dp=2, stage=0, load="a"),
    Job("b-tp2-dp1-zero2", tp=2, dp=1, stage=2, precision="bf16", load="b"),
    Job("a-tp1-dp1-zero1", tp=1, dp=1, stage=1, load="a"),
    Job("b-tp1-dp1-zero1", tp=1, dp=1, stage=1, precision="bf16", load="b"),
    Job("a-tp2-dp2-zero2", tp=2, dp=2, stage=2, load="a"),
    Job("a-tp2-dp2-zero3", tp=2, dp=2, stage=3, load="a"),
    Job("b-tp2-dp2-zero1", tp=2, dp=2, stage=1, precision="bf16", load="b"),
]


def main() -> None:
    folder = Path(sys.argv[1])
    for world_size in (2, 1, 4):
        run_ranks(world_size, partial(work, world_size, folder))


def work(world_size: int, folder: Path) -> None:
    dist.init_process_group("gloo")
    todo = [job for job in JOBS if job.tp * job.dp == world_size]
    for job in todo:
        run = job.run_config(folder)
        with model_parallel_groups(run.parallel, 0, torch.device("cpu")) as groups:
            carry_out(job, run, folder, groups)
    if world_size == 2:
        refuse(todo[0], folder)
    dist.barrier()
    dist.destroy_process_group()


def carry_out(job: Job, run: RunConfig, folder: Path, groups: Groups) -> None:
    engine = new_engine(run, groups)
    if job.load:
        reader = CheckpointReader(find_checkpoint(folder / job.load))
        load_checkpoint(engine, reader, groups)
        state = reader.state
    else:
        take_steps(engine, range(STEPS), job.dp, groups)
        state = TrainState(STEPS, STEPS * SEQUENCES)
    save_checkpoint(engine, run, state, groups)
    if groups.rank == 0:
        leave_interrupted(checkpoints_dir(Path(run.run.dir)))
    save_checkpoint(engine, run, state, groups)  # the same step again replaces the first
    following = take_steps(engine, range(state.step, state.step + 2), job.dp, groups)
    if groups.rank == 0:
        (folder / f"{job.name}.json").write_text(json.dumps(following))


def leave_interrupted(folder: Path) -> None:
    """What a kill leaves in the middle of a save, and in the middle of the removal of this job's own step."""
    for name in ("step-00000007.tmp", f"step-{STEPS:08d}.removed.tmp"):
        (folder / name).mkdir(parents=True)
        (folder / name / "rank-00000.safetensors").touch()


def refuse(job: Job, folder: Path) -> None:
    """Save where a file stands in the way; every rank must learn of it."""
    run = job.run_config(folder / "refused")
    in_the_way = checkpoints_dir(Path(run.run.dir))
    if dist.get_rank() == 0:
        in_the_way.parent.mkdir(parents=True)
        in_the_way.touch()
    with model_parallel_groups(run.parallel, 0, torch.device("cpu")) as groups:
        engine = new_engine(run, groups)
        take_steps(engine, range(1), job.dp, groups)
        try:
            save_checkpoint(engine, run, TrainState(1, 4), groups)
        except OutputError as error:
            (folder / f"refused-{groups.rank}.txt").write_text(str(error))


def new_engine(run: RunConfig, groups: Groups) -> DeepSpeedEngine:
    model = build_model(run.model, run.parallel, groups, dtype_of(run), run.run.seed)
    return build_engine(model, run, groups)


def take_steps(engine: DeepSpeedEngine, steps: range, dp: int, groups: Groups) -> list[tuple[float, float]]:
    """(loss, gradient norm) of each step."""
    found = [train_step(engine, batches(step, dp, groups.dp_rank), 1, 1e-2, groups) for step in steps]
    return [(result.loss, result.grad_norm) for result in found]


def batches(step: int, dp: int, dp_rank: int) -> Iterator[MicroBatch]:
    """This rank's part of the sequences of a step, which are the same under every layout."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(VOCAB, (SEQUENCES, SEQ_LENGTH + 1), generator=generator).chunk(dp)[dp_rank]
    yield MicroBatch(tokens[:, :-1], tokens[:, 1:])


if __name__ == "__main__":
    main()
