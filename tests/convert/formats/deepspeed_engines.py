"""Engines save folders of DeepSpeed's, and load the universal ones that are made of them.

A job that saves trains and leaves FOLDER/NAME/deepspeed, our own checkpoint beside it, and the losses of the
next steps in NAME.json; one that loads leaves our checkpoint of what it then has, and the same losses.
"""

import argparse
import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import deepspeed
import deepspeed.ops
import torch
import torch.distributed as dist
from deepspeed.checkpoint import ds_to_universal
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from llama_mcore.checkpoint.deepspeed_export import save_deepspeed_folder
from llama_mcore.checkpoint.paths import KINDS, WEIGHT
from llama_mcore.checkpoint.saver import save_checkpoint
from llama_mcore.checkpoint.train_state import TrainState
from llama_mcore.config.schema import RunConfig
from llama_mcore.convert.formats.deepspeed import FORMAT
from llama_mcore.convert.formats.native import NativeWeights
from llama_mcore.convert.model_weights import Weights
from llama_mcore.convert.registry import WriteOptions
from llama_mcore.distributed.groups import Groups
from tests.checkpoint.jobs import SEQUENCES, STEPS, VOCAB, Job, go_on, new_engine, on_rank, take_steps
from tests.convert.invented import Invented
from tests.support.world import ROOT, run_ranks

FP32 = Job("zero2-dp2-fp32", tp=1, dp=2, stage=2)
BF16 = Job("zero1-tp2-bf16", tp=2, dp=1, stage=1, precision="bf16")
SAVED = [
    FP32,
    BF16,
    Job("zero1-dp2-bf16", tp=1, dp=2, stage=1, precision="bf16"),
    Job("zero1-tp2-fp32", tp=2, dp=1, stage=1),
    Job("zero2-tp2-bf16", tp=2, dp=1, stage=2, precision="bf16"),
    Job("zero3-dp2-bf16", tp=1, dp=2, stage=3, precision="bf16"),
    Job("zero3-tp2-fp32", tp=2, dp=1, stage=3),
]
UNIVERSAL, THEIRS, NEW = "universal", "theirs", "new"
HF, HF_STEPS = "hf", 2


@dataclass(frozen=True)
class Load:
    """A job that loads the universal folder that was made of another."""

    saved: Job
    job: Job
    universal: str = UNIVERSAL


LOADED = [
    Load(FP32, Job("on-zero1", tp=1, dp=1, stage=1)),
    Load(FP32, Job("on-zero2-tp2", tp=2, dp=1, stage=2)),
    Load(FP32, Job("on-zero3-dp2", tp=1, dp=2, stage=3)),
    Load(BF16, Job("on-zero1-dp2-bf16", tp=1, dp=2, stage=1, precision="bf16")),
    Load(BF16, Job("on-zero1-tp2-dp2-bf16", tp=2, dp=2, stage=1, precision="bf16")),
]
FRESH = Load(FP32, Job("fresh", tp=2, dp=1, stage=1), NEW)
"""Universal folder of weights alone, with a token less than the ranks can share."""


def invented() -> Invented:
    model = FP32.run_config(Path()).model.model_copy(update={"vocab_size": VOCAB - 1})
    return Invented(model, torch.float32)


def llama() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=24,
        intermediate_size=36,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        tie_word_embeddings=True,
    )


def save_and_load(folder: Path) -> None:
    for job in SAVED:
        run_ranks(job.world_size, on_rank, job, partial(save, folder, job))
    run_ranks(1, convert, folder)
    run_ranks(2, train_llama, folder / HF)
    for load in [*LOADED, FRESH]:
        run_ranks(load.job.world_size, on_rank, load.job, partial(resume, folder, load))


def save(folder: Path, job: Job, _: Job, groups: Groups) -> None:
    run = job.run_config(folder)
    engine = new_engine(run, groups)
    for first, last in ((0, STEPS - 1), (STEPS - 1, STEPS)):
        take_steps(engine, range(first, last), job.dp, groups)
        state = TrainState(last, last * SEQUENCES)
        save_deepspeed_folder(engine, run, state, groups)
    save_checkpoint(engine, run, state, groups)
    go_on(engine, job, folder / f"{job.name}.json", groups)


def convert(folder: Path) -> None:
    for job in (FP32, BF16):
        write(NativeWeights(folder / job.name), folder / job.name / UNIVERSAL, KINDS)
        arguments = argparse.Namespace(
            input_folder=str(folder / job.name / f"deepspeed/step-{STEPS:08d}"),
            output_folder=str(folder / job.name / THEIRS / "made"),
            num_extract_workers=1,
            num_merge_workers=1,
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=False,
        )
        ds_to_universal.main(arguments)
    write(invented(), folder / FP32.name / NEW, (WEIGHT,))


def write(weights: Weights, folder: Path, kinds: tuple[str, ...]) -> None:
    folder.mkdir()
    FORMAT.write(weights, folder, WriteOptions(torch.float32, kinds, tp=2), lambda size: None)


def resume(folder: Path, load: Load, job: Job, groups: Groups) -> None:
    run = job.run_config(folder)
    engine = new_engine(with_universal(run, folder / f"{job.name}-{groups.rank}-ds.json"), groups)
    engine.load_checkpoint(str(folder / load.saved.name / load.universal))
    step = engine.global_steps
    save_checkpoint(engine, run, TrainState(step, step * SEQUENCES), groups)
    go_on(engine, job, folder / f"{job.name}.json", groups)


def with_universal(run: RunConfig, file: Path) -> RunConfig:
    """The run with the DeepSpeed configuration that loads universal folders."""
    config = json.loads((ROOT / (run.zero.config or f"ds_configs/zero{run.zero.stage}.json")).read_text())
    file.write_text(json.dumps({**config, "checkpoint": {"load_universal": True}}))
    return run.model_copy(update={"zero": run.zero.model_copy(update={"config": str(file)})})


def train_llama(folder: Path) -> None:
    """Training by Hugging Face's model and DeepSpeed, without our code."""
    dist.init_process_group("gloo")
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else it compiles for minutes
    torch.manual_seed(0)
    for stage in (2, 3):
        model: nn.Module = LlamaForCausalLM(llama())
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
            "bf16": {"enabled": stage == 2},
        }
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=config, dist_init_required=False
        )
        for _ in range(HF_STEPS):
            tokens = torch.randint(VOCAB, (1, 8))
            engine.backward(engine(input_ids=tokens, labels=tokens).loss)
            engine.step()
        engine.save_checkpoint(str(folder / f"zero{stage}"))
    dist.destroy_process_group()
