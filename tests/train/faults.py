"""Two ranks, of which one gets a wrong number, under every ZeRO stage, precision and axis."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama_mcore.checkpoint.loader import load_checkpoint
from llama_mcore.checkpoint.optimizer_shards import owned_fragments
from llama_mcore.checkpoint.paths import checkpoints_dir
from llama_mcore.checkpoint.reader import CheckpointReader
from llama_mcore.checkpoint.saver import save_checkpoint
from llama_mcore.checkpoint.train_state import HealthState, TrainState
from llama_mcore.config.schema import RunConfig
from llama_mcore.data.loader import MicroBatch
from llama_mcore.distributed.groups import Groups, process_groups
from llama_mcore.distributed.replicas import check_replicas
from llama_mcore.errors import NumericalError
from llama_mcore.model.build import build_model
from llama_mcore.train.engine import DeepSpeedEngine, build_engine, dtype_of, full_fp32_weight
from llama_mcore.train.step import train_step
from tests.support.models import run_config

CASES = {
    f"{precision}-zero{stage}-tp{tp}": (precision, stage, tp)
    for precision, stage, tp in [
        ("fp32", 0, 1),
        ("fp32", 1, 1),
        ("fp32", 2, 1),
        ("fp32", 3, 1),
        ("bf16", 1, 1),
        ("bf16", 2, 1),
        ("bf16", 3, 1),
        ("fp32", 0, 2),
        ("bf16", 1, 2),
        ("fp32", 3, 2),
    ]
}
NORM = "decoder.final_layernorm.weight"


def config(run_dir: Path, precision: str, stage: int, tp: int) -> RunConfig:
    return run_config(
        run_dir,
        parallel={"tp": tp, "sequence_parallel": tp > 1},
        # the shipped file of stage 3: it leaves norm weights whole, of which all ranks then hold copies
        zero={"stage": stage, "config": None},
        train={"precision": precision, "micro_batch_size": 2, "global_batch_size": 8},
    )


def examine(run: RunConfig) -> dict[str, Any]:
    """Findings of this rank."""
    with process_groups(run.parallel, seed=1) as groups:
        model = build_model(run.model, run.parallel, groups, dtype_of(run.train), run.run.seed)
        engine = build_engine(model, run.zero, run.train, run.optim, groups)
        return {
            "nan_in_the_first_step": take_step(engine, run, groups, nan_loss),
            "unfinished_state": saved_and_loaded(
                engine, run, groups, TrainState(1, health=HealthState(skipped=1))
            ),
            "before": take_step(engine, run, groups, nothing),
            "nan_loss": take_step(engine, run, groups, nan_loss),
            "inf_gradient": take_step(engine, run, groups, inf_gradient),
            "after": take_step(engine, run, groups, nothing),
            "rolled_back": saved_and_loaded(
                engine, run, groups, TrainState(5, health=HealthState(skipped=3))
            ),
            "replicas": replicas(engine, groups),
            "save": save_of_nan(engine, run, groups),
        }


@contextmanager
def nothing(engine: DeepSpeedEngine, groups: Groups) -> Iterator[None]:
    yield


@contextmanager
def nan_loss(engine: DeepSpeedEngine, groups: Groups) -> Iterator[None]:
    """NaN loss on the last rank, with a finite gradient."""
    last = groups.rank == groups.world_size - 1
    hook = engine.module.register_forward_hook(
        lambda module, args, loss: loss + (float("nan") if last else 0.0)
    )
    yield
    hook.remove()


@contextmanager
def inf_gradient(engine: DeepSpeedEngine, groups: Groups) -> Iterator[None]:
    """Infinite gradient in one element of one weight of the last rank."""

    def spoil(gradient: Tensor) -> Tensor:
        spoilt = gradient.clone()
        spoilt.view(-1)[3] = float("inf")
        return spoilt

    weight = engine.module.get_parameter("embedding.word_embeddings.weight")
    last = groups.rank == groups.world_size - 1
    hook = weight.register_hook(spoil) if last else None
    yield
    if hook:
        hook.remove()


Fault = Callable[[DeepSpeedEngine, Groups], Any]


def take_step(engine: DeepSpeedEngine, run: RunConfig, groups: Groups, fault: Fault) -> dict[str, Any]:
    before = weights(engine)
    accumulation = run.accumulation_steps(groups.world_size)
    with fault(engine, groups):
        result = train_step(engine, batches(accumulation, groups), 1e-2, groups)
    after = weights(engine)
    return {
        "skipped": result.skipped,
        "changed": not same(before, after),
        "finite": all(bool(tensor.isfinite().all()) for tensor in after),
        "loss_finite": abs(result.loss) < float("inf"),
        "norm_finite": abs(result.grad_norm) < float("inf"),
    }


def saved_and_loaded(
    engine: DeepSpeedEngine, run: RunConfig, groups: Groups, state: TrainState
) -> dict[str, Any]:
    """Compare an engine that was loaded with what it was when saved, and its next step with that of then."""
    before = weights(engine)
    path = save_checkpoint(engine, run, state, groups)
    take_step(engine, run, groups, nothing)
    first = weights(engine)
    load_checkpoint(engine, CheckpointReader(path), groups)
    returned = weights(engine)
    take_step(engine, run, groups, nothing)
    second = weights(engine)
    load_checkpoint(engine, CheckpointReader(path), groups)
    return {
        "moved": not same(before, first),
        "returned": same(before, returned),
        "same_step": same(first, second),
        "adam_steps": CheckpointReader(path).state.updates,
    }


def replicas(engine: DeepSpeedEngine, groups: Groups) -> dict[str, Any]:
    """Verdicts of the check on equal copies, and on one with a flipped bit on rank 1."""
    found = {"equal": problems_of(lambda: check_replicas(engine.module, groups, 1))}
    weight = engine.module.get_parameter(NORM)
    flip_lowest_bit(weight if weight.numel() else weight.ds_tensor, groups.rank == 1)
    found["flipped"] = problems_of(lambda: check_replicas(engine.module, groups, 1))
    flip_lowest_bit(weight if weight.numel() else weight.ds_tensor, groups.rank == 1)
    return found


def flip_lowest_bit(values: Tensor, here: bool) -> None:
    if here:
        bits = values.detach().view(-1).view(torch.int16)
        bits[0] ^= 1


def save_of_nan(engine: DeepSpeedEngine, run: RunConfig, groups: Groups) -> dict[str, Any]:
    """A save of weights of which one, on one rank, became NaN."""
    owned = owned_fragments(engine, groups.dp_rank)
    saves_all = run.zero.stage == 0 and run.parallel.tp == 1
    if groups.rank == (0 if saves_all else 1):
        cut = next(
            fragment for fragment in owned if fragment.name == "output_layer.weight" and fragment.numel
        )
        cut.view("weight")[-1] = float("nan")
    before = sorted(os.listdir(checkpoints_dir(Path(run.run.dir))))
    problems = problems_of(lambda: save_checkpoint(engine, run, TrainState(9), groups))
    after = sorted(os.listdir(checkpoints_dir(Path(run.run.dir))))
    return {"problems": problems, "before": before, "after": after}


def problems_of(action: Callable[[], object]) -> list[str]:
    try:
        action()
    except NumericalError as error:
        return [str(problem) for problem in error.problems]
    return []


def weights(engine: DeepSpeedEngine) -> list[Tensor]:
    return [full_fp32_weight(parameter).clone() for parameter in engine.module.parameters()]


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(torch.equal(*pair) for pair in zip(left, right, strict=True))


def batches(count: int, groups: Groups) -> list[MicroBatch]:
    generator = torch.Generator().manual_seed(groups.dp_rank)
    tokens = torch.randint(64, (count, 2, 9), generator=generator)
    return [MicroBatch(part[:, :-1], part[:, 1:]) for part in tokens]
