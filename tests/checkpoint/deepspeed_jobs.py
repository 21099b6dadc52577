"""Worker: train on two ranks, save both kinds of checkpoint, and go on from DeepSpeed's own in a new engine.

python tests/checkpoint/deepspeed_jobs.py FOLDER
"""

import json
import sys
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from llama_mcore.checkpoint.deepspeed_folder import save_deepspeed_folder
from llama_mcore.checkpoint.save import save_checkpoint
from llama_mcore.parallel.groups import model_parallel_groups
from llama_mcore.train.state import TrainState
from tests.checkpoint.jobs import SEQUENCES, STEPS, Job, new_engine, take_steps
from tests.forked import run_ranks

JOBS = [
    Job("tp2-zero1", tp=2, dp=1, stage=1, precision="bf16"),
    Job("dp2-zero2", tp=1, dp=2, stage=2, precision="fp32"),
    Job("dp2-zero3", tp=1, dp=2, stage=3, precision="fp32"),
]


def work(folder: Path) -> None:
    dist.init_process_group("gloo")
    for job in JOBS:
        run = job.run_config(folder)
        with model_parallel_groups(run.parallel, 0, torch.device("cpu")) as groups:
            engine = new_engine(run, groups)
            take_steps(engine, range(STEPS), job.dp, groups)
            state = TrainState(STEPS, STEPS * SEQUENCES)
            for step in (1, 2, STEPS):  # the last two stay
                path = save_deepspeed_folder(engine, run, TrainState(step, step * SEQUENCES), groups)
            save_checkpoint(engine, run, state, groups)
            expected = take_steps(engine, range(STEPS, STEPS + 2), job.dp, groups)
            again = new_engine(run, groups)
            again.load_checkpoint(str(path.parent), tag=path.name)
            found = take_steps(again, range(STEPS, STEPS + 2), job.dp, groups)
            if groups.rank == 0:
                (folder / f"{job.name}.json").write_text(json.dumps([expected, found]))
    dist.destroy_process_group()


if __name__ == "__main__":
    run_ranks(2, partial(work, Path(sys.argv[1])))
