"""Bytes that training really allocates on the CPU: the model state of a rank before the optimizer's step, and
what a forward keeps."""

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from deepspeed import DeepSpeedEngine
from torch import Tensor

from llama_mcore.benchmark.memory import kept_bytes
from llama_mcore.config.schema import RunConfig
from llama_mcore.data.loader import MicroBatch
from llama_mcore.distributed.config import ParallelConfig
from llama_mcore.distributed.groups import Groups, process_groups
from llama_mcore.model.build import build_model
from llama_mcore.plan.layout.memory import ModelState
from llama_mcore.train.engine import build_engine, dtype_of
from llama_mcore.train.step import mean_loss
from tests.support.models import PADDED, model_config, run_config

DP = {1: 3, 2: 2}  # tp -> data-parallel ranks
SEQUENCES = 2
STATES = [
    f"zero{stage}/{precision}/{tied}"
    for stage, precision in [(0, "fp32"), *itertools.product((1, 2, 3), ("bf16", "fp32"))]
    for tied in ("tied", "untied")
]
SAVED = [
    f"{layout}/{recompute}/{precision}/{tied}"
    for layout in ("sp-off", "sp-on")
    for recompute, precision, tied in (
        ("none", "bf16", "untied"),
        ("none", "fp32", "untied"),
        ("selective", "bf16", "tied"),
        ("selective", "bf16", "untied"),
        ("selective", "fp32", "untied"),
        ("full", "bf16", "untied"),
        ("full", "fp32", "untied"),
    )
]


def states(tp: int) -> list[str]:
    return [name for name in STATES if name.endswith("/untied") or (tp == 1 and "/bf16/" in name)]


def savings(tp: int) -> list[str]:
    return [name for name in SAVED if tp > 1 or name.startswith("sp-off")]


def measured(tp: int) -> dict[str, object]:
    """Findings of this rank in each case, in a job of `tp` x DP[tp] ranks."""
    # Once: the threads of groups stay, and hundreds of them take all of a machine.
    with process_groups(run_of(STATES[0], tp).parallel, seed=0) as groups:
        return {name: state(name, groups) for name in states(tp)} | {
            name: saved(name, groups) for name in savings(tp)
        }


def run_of(name: str, tp: int) -> RunConfig:
    stage, precision, tied = name.split("/")
    return run_config(
        Path("unused"),
        PADDED,
        model={"tie_embeddings": tied == "tied"},
        parallel={"tp": tp, "sequence_parallel": tp > 1},
        # with the shipped file, also for stage 3
        zero={"stage": int(stage.removeprefix("zero")), "config": None},
        train={"micro_batch_size": 1, "global_batch_size": 2 * DP[tp], "precision": precision},
    )


def state(name: str, groups: Groups) -> list[int]:
    """[weights, gradients, masters, moments] in bytes, after the first backward of the second step: the
    optimizer has its moments, and gradients of one micro-batch wait for those of the next."""
    run = run_of(name, groups.tp_size)
    model = build_model(run.model, run.parallel, groups, dtype_of(run.train), run.run.seed)
    engine = build_engine(model, run.zero, run.train, run.optim, groups)
    tokens = torch.randint(run.model.vocab_size, (1, run.model.seq_length + 1))
    for _ in range(2):
        _backward(engine, tokens, groups)
        engine.step()
    _backward(engine, tokens, groups)
    found = ModelState(
        weights=_bytes(_weights(engine)),
        gradients=_bytes(_gradients(engine)),
        masters=_bytes(_masters(engine)),
        moments=_bytes(_moments(engine)),
    )
    return list(vars(found).values())


def _backward(engine: DeepSpeedEngine, tokens: Tensor, groups: Groups) -> None:
    engine.backward(mean_loss(engine, MicroBatch(tokens[:, :-1], tokens[:, 1:]), groups, None))


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Each storage once, as a whole: padding counts."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _weights(engine: DeepSpeedEngine) -> Iterator[Tensor]:
    for parameter in engine.module.parameters():
        yield parameter.data
        if hasattr(parameter, "ds_tensor"):
            yield parameter.ds_tensor


def _gradients(engine: DeepSpeedEngine) -> Iterator[Tensor]:
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage == 3:
        yield optimizer.grad_partitions_flat_buffer
    elif stage == 1 and hasattr(optimizer, "fp32_groups_gradients_flat"):
        yield from optimizer.fp32_groups_gradients_flat
    elif stage == 2:
        for accumulated in _accumulated(optimizer):
            yield from (tensor for tensor in accumulated if tensor is not None)
    else:
        yield from (p.grad for p in engine.module.parameters() if p.grad is not None)


def _accumulated(optimizer: object) -> Iterator[list]:
    for name in ("all_grad_tensors", "averaged_gradients"):
        yield from (tensors for tensors in getattr(optimizer, name).values() if tensors is not None)


def _masters(engine: DeepSpeedEngine) -> Iterator[Tensor]:
    optimizer = engine.optimizer
    for name in (
        "fp32_partitioned_groups_flat",
        "single_partition_of_fp32_groups",
        "fp32_groups_flat_partition",
    ):
        if hasattr(optimizer, name):
            yield from getattr(optimizer, name)
            return


def _moments(engine: DeepSpeedEngine) -> Iterator[Tensor]:
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    for states in inner.state.values():
        yield from (states["exp_avg"], states["exp_avg_sq"])


def saved(name: str, groups: Groups) -> int:
    layout, recompute, precision, tied = name.split("/")
    shape = model_config(PADDED, recompute=recompute, tie_embeddings=tied == "tied")
    parallel = ParallelConfig(tp=groups.tp_size, sequence_parallel=layout == "sp-on")
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    model = build_model(shape, parallel, groups, dtype, 0)
    tokens = torch.randint(shape.vocab_size, (SEQUENCES, shape.seq_length + 1))
    kept, _ = kept_bytes(
        lambda: model(tokens[:, :-1].contiguous(), labels=tokens[:, 1:].contiguous()), model.parameters()
    )
    return kept
