"""Worker: everything of the parallel package that needs several processes.

    python tests/parallel/worker.py OUTPUT_DIR

Rank r of job NAME leaves what it found in NAME-r.json.
"""

import inspect
import json
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from llama_mcore.errors import NumericalError
from llama_mcore.model.build import build_model
from llama_mcore.model.config import ModelConfig
from llama_mcore.parallel import mcore_cpu
from llama_mcore.parallel.config import ParallelConfig
from llama_mcore.parallel.groups import process_groups
from llama_mcore.parallel.mpu import Mpu
from llama_mcore.parallel.overlap import TensorParallel
from llama_mcore.parallel.replicas import check_replicas
from tests.forked import run_ranks

PATCHES = [
    name
    for name, value in vars(mcore_cpu).items()
    if inspect.isfunction(value)
    and value.__module__ == mcore_cpu.__name__
    and not name.startswith("_")
    and name != "patch_mcore_for_cpu"
]
MODEL = ModelConfig(
    num_layers=2,
    hidden_size=32,
    num_attention_heads=4,
    ffn_hidden_size=64,
    vocab_size=64,
    seq_length=8,
    layer="stock",
    recompute="full",
)


def main() -> None:
    output = Path(sys.argv[1])
    jobs: dict[str, tuple[int, Callable[[], Any]]] = {
        "patches": (1, lambda: PATCHES),
        "without-nothing": (2, lambda: megatron_without(None)),
        **{f"without-{patch}": (2, partial(megatron_without, patch)) for patch in PATCHES},
        "groups": (4, four_ranks),
        "raising": (2, raising),
        "alone": (1, alone),
        "replicas": (3, three_copies),
        "overlap-2": (2, partial(overlap, 2)),
        "overlap-4": (4, partial(overlap, 4)),
    }
    for name, (world_size, job) in jobs.items():
        run_ranks(world_size, partial(write, output, name, job))


def write(output: Path, name: str, job: Callable[[], Any]) -> None:
    found = job()
    (output / f"{name}-{os.environ.get('RANK', 0)}.json").write_text(json.dumps(found))


def megatron_without(patch: str | None) -> str:
    """One forward and backward of megatron-core's own layers under TP, SP and full recomputation."""
    if patch:
        setattr(mcore_cpu, patch, lambda *_: None)
    parallel = ParallelConfig(tp=2, sequence_parallel=True)
    try:
        with process_groups(parallel, seed=1) as groups:
            model = build_model(MODEL, parallel, groups, torch.float32, seed=1)
            tokens = torch.arange(16).view(2, 8)
            model(tokens, labels=tokens).mean().backward()
            assert all(parameter.grad is not None for parameter in model.parameters())
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "works"


def four_ranks() -> dict[str, Any]:
    with process_groups(ParallelConfig(tp=2), seed=1) as groups:
        mpu = Mpu(groups)
        forwarded = [name for name in ("rank", "world_size", "tp_group", "device") if hasattr(mpu, name)]
        answers = {
            name: getattr(mpu, name)() for name in dir(mpu) if name.startswith("get_") and "group" not in name
        }
        found = {
            "tp": [groups.tp_rank, groups.tp_size, *dist.get_process_group_ranks(groups.tp_group)],
            "dp": [groups.dp_rank, groups.dp_size, *dist.get_process_group_ranks(groups.dp_group)],
            "world": [groups.rank, groups.world_size],
            "forwarded": forwarded,
            "answers": answers,
            "model_group": dist.get_process_group_ranks(mpu.get_model_parallel_group()),
            "tensor_group": dist.get_process_group_ranks(mpu.get_tensor_model_parallel_group()),
            "data_group": dist.get_process_group_ranks(mpu.get_data_parallel_group()),
            "data_group_ranks": mpu.get_data_parallel_group_ranks(),
        }
    return found | {"left": alive()}


def three_copies() -> dict[str, list[str]]:
    """What is found of equal weights, and where those of rank 2, then of each, differ in a bit."""
    found = {}
    with process_groups(ParallelConfig(tp=1), seed=1) as groups:
        model = torch.nn.Linear(3, 2)
        for parameter in model.parameters():
            parameter.tensor_model_parallel = True
            torch.nn.init.ones_(parameter)
        for name, bits in {"equal": 0, "one": int(groups.rank == 2), "all": groups.rank + 1}.items():
            torch.nn.init.ones_(model.bias)
            model.bias.detach().view(torch.int32)[1] ^= bits
            found[name] = []
            try:
                check_replicas(model, groups, step=7)
            except NumericalError as error:
                found[name] = [str(problem) for problem in error.problems]
    return found


def raising() -> dict[str, Any]:
    """The body fails on rank 1 alone; neither rank may wait for the other."""
    try:
        with process_groups(ParallelConfig(tp=2), seed=1) as groups:
            if groups.rank == 1:
                raise ValueError("of the body")
    except (ValueError, RuntimeError) as error:
        return {"error": str(error), "left": alive()}
    return {"error": None, "left": alive()}


def alone() -> dict[str, Any]:
    """Without anything that a launcher sets."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        del os.environ[name]
    with process_groups(ParallelConfig(), seed=1) as groups:
        found = [groups.rank, groups.world_size, groups.tp_size, groups.dp_size]
    return {"found": found, "left": alive()}


def alive() -> list[bool]:
    return [dist.is_initialized(), parallel_state.model_parallel_is_initialized()]


def overlap(size: int) -> list[str]:
    """Names of the collectives whose result is not the plain one."""
    with process_groups(ParallelConfig(tp=size), seed=1) as groups:
        rank, wrong = groups.rank, []
        # Whole numbers: sums are exact in any order.
        whole = torch.arange(8 * 3 * 2.0).view(8, 3, 2)  # [s, b, h]
        mine = slice(rank * 8 // size, (rank + 1) * 8 // size)
        total = whole * size + sum(range(size))
        expected: dict[bool, tuple[Tensor, Tensor, Tensor]] = {
            True: (whole, total[mine], total),
            False: (whole[mine], total, whole + rank),
        }
        for sequence_parallel, (gathered, reduced, replicated) in expected.items():
            tp = TensorParallel(groups.tp_group, sequence_parallel)
            results = {
                "gather": (tp.start_gather(whole[mine].clone()), gathered),
                "reduce": (tp.start_reduce(whole + rank), reduced),
                "replicated_sum": (tp.start_replicated_sum(whole + rank), replicated),
            }
            wrong += [
                f"{name}, sequence_parallel={sequence_parallel}"
                for name, (pending, right) in results.items()
                if not torch.equal(pending.wait(), right)
            ]
    return wrong


if __name__ == "__main__":
    main()
