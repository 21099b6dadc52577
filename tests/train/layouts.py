"""Worker: train the same five steps under every layout of a world size and write down what came out.

    torchrun --nproc-per-node N tests/train/layouts.py OUTPUT_DIR [--without-norm-sum]

For each layout OUTPUT_DIR/NAME.json holds losses, gradient norms and the replicated parameters whose
tensor-parallel replicas differ; NAME.safetensors holds the final full weights.
"""

import itertools
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn

from llama_mcore.config import RunConfig
from llama_mcore.data.loader import MicroBatch
from llama_mcore.model import rmsnorm
from llama_mcore.model.build import build_model
from llama_mcore.model.sharding import cut_of, unshard
from llama_mcore.parallel.config import ParallelConfig
from llama_mcore.parallel.groups import Groups, model_parallel_groups
from llama_mcore.train.engine import build_engine, full_fp32_weight
from llama_mcore.train.optimizer import build_optimizer
from llama_mcore.train.step import train_step

# Shards even the smallest weight, which the shipped file leaves whole.
ZERO3_CONFIG = str(Path(__file__).with_name("zero3_shard_all.json"))
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

    @property
    def name(self) -> str:
        sp = "sp" if self.sequence_parallel else "nosp"
        return f"tp{self.tp}-{sp}-zero{self.stage}-dp{self.dp}-acc{self.accumulation}-{self.recompute}"

    def run_config(self) -> RunConfig:
        return RunConfig.model_validate(
            {
                "run": {"dir": "unused"},
                "model": {
                    "num_layers": 2,
                    "hidden_size": 64,
                    "num_attention_heads": 4,
                    "num_query_groups": 2,
                    "ffn_hidden_size": 176,
                    "vocab_size": 512,
                    "seq_length": 32,
                    "recompute": self.recompute,
                },
                "parallel": {"tp": self.tp, "sequence_parallel": self.sequence_parallel},
                "zero": {"stage": self.stage, "config": ZERO3_CONFIG if self.stage == 3 else None},
                "data": {"train": "unused"},
                "train": {
                    "steps": STEPS,
                    "micro_batch_size": SEQUENCES // (self.dp * self.accumulation),
                    "global_batch_size": SEQUENCES,
                    "precision": "fp32",
                },
                "optim": {"lr": LR, "warmup_steps": 0},
            }
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


def batches(layout: Layout, dp_rank: int) -> Iterator[MicroBatch]:
    """The same sequences at every step of every layout; here those of one data-parallel rank."""
    size = SEQUENCES // (layout.dp * layout.accumulation)
    for step in range(STEPS):
        tokens = torch.randint(512, (SEQUENCES, 33), generator=torch.Generator().manual_seed(step))
        for part in range(layout.accumulation):
            start = (part * layout.dp + dp_rank) * size
            chosen = tokens[start : start + size]
            yield MicroBatch(chosen[:, :-1], chosen[:, 1:])


def train_layout(layout: Layout, groups: Groups) -> tuple[list[float], list[float], nn.Module]:
    run = layout.run_config()
    model = build_model(run.model, run.parallel, groups, torch.float32, run.run.seed)
    engine = build_engine(model, run, groups)
    results = []
    data = batches(layout, groups.dp_rank)
    for _ in range(STEPS):
        results.append(train_step(engine, data, layout.accumulation, LR, groups))
    return [r.loss for r in results], [r.grad_norm for r in results], model


def train_reference(groups: Groups) -> tuple[list[float], list[float], nn.Module]:
    """One process, plain torch: no DeepSpeed, no accumulation."""
    layout = Layout(1, 1, False, 0, 1)
    run = layout.run_config()
    model = build_model(run.model, run.parallel, groups, torch.float32, run.run.seed)
    optimizer = build_optimizer(model, run.optim)
    losses, norms = [], []
    for batch in batches(layout, 0):
        loss = model(batch.tokens, labels=batch.labels)
        loss.backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), run.optim.clip_grad).item())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, norms, model


def gather(model: nn.Module, groups: Groups) -> tuple[dict[str, Tensor], list[str]]:
    """Full final weights, and the replicated parameters that are not bitwise equal on all ranks."""
    full, differing = {}, []
    for name, parameter in model.named_parameters():
        weight = full_fp32_weight(parameter).contiguous()
        shards = [torch.empty_like(weight) for _ in range(groups.tp_size)]
        dist.all_gather(shards, weight, group=groups.tp_group)
        cut = cut_of(name)
        full[name] = unshard(shards, cut).clone()
        if cut is None and not all(torch.equal(shards[0], other) for other in shards):
            differing.append(name)
    return full, differing


def write(
    output: Path, name: str, losses: list[float], norms: list[float], model: nn.Module, groups: Groups
) -> None:
    full, differing = gather(model, groups)
    if groups.rank == 0:
        save_file(full, output / f"{name}.safetensors")
        (output / f"{name}.json").write_text(
            json.dumps({"losses": losses, "grad_norms": norms, "differing": differing})
        )


def main() -> None:
    output = Path(sys.argv[1])
    todo = layouts(int(sys.argv[2]))
    if "--without-norm-sum" in sys.argv:
        rmsnorm.copy_to_tensor_model_parallel_region = lambda weight: weight
        todo = [Layout(2, 1, True, 1, 1)]
    dist.init_process_group("gloo")
    for tp in sorted({layout.tp for layout in todo}):
        # Once: the threads of groups stay, and hundreds of them take all of a machine.
        with model_parallel_groups(ParallelConfig(tp=tp), 0, torch.device("cpu")) as groups:
            for layout in todo:
                if layout.tp == tp:
                    write(output, layout.name, *train_layout(layout, groups), groups)
            if dist.get_world_size() == 1:
                write(output, "reference", *train_reference(groups), groups)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
