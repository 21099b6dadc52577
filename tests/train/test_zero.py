"""llama_mcore.train.zero in bf16: each step of a DeepSpeed engine against plain torch from the same weights.

Plain torch makes bf16 gradients of both micro-batches of a step, adds them in fp32, clips and runs AdamW. The
sum of two has the same bits in any order, so that only the update's own roundings differ: `EPS` times some
ten operations, and the errors of Adam's moments (tests/train/test_adamw.py), with 4 more for clipping.
"""

import hashlib
import inspect
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import deepspeed
import pytest
import torch
from deepspeed import DeepSpeedEngine
from deepspeed.runtime import bf16_optimizer, engine, utils
from deepspeed.runtime.zero import stage_1_and_2
from deepspeed.utils import safe_get_full_grad
from torch import Tensor

from llama_mcore.config.schema import RunConfig
from llama_mcore.data.loader import MicroBatch
from llama_mcore.distributed.config import ParallelConfig
from llama_mcore.distributed.groups import Groups, process_groups
from llama_mcore.model.build import build_model
from llama_mcore.train import zero
from llama_mcore.train.engine import build_engine, full_fp32_weight
from llama_mcore.train.optim import build_optimizer
from llama_mcore.train.step import train_step
from llama_mcore.train.zero import Stage2
from tests.support.models import UNEVEN, run_config
from tests.support.world import call, run_ranks

EPS = 2.0**-24
NORM_ERROR = 16 * EPS
"""Error of a row's norm in fp32: its 4,096 squares are summed in at least 8 lanes, and errors cancel."""
LR, CLIP = 1e-2, 0.05
MICRO_BATCHES = 2
NORM = "decoder.final_layernorm.weight"
CASES = {
    f"zero{stage}-{recompute}{'-tied' if tied else ''}": (stage, recompute, tied)
    for stage in (1, 2)
    for recompute, tied in (("none", False), ("selective", False), ("full", False), ("selective", True))
}
TIED = [case for case in CASES if case.endswith("tied")]


@dataclass
class Found:
    norms: list[tuple[float, float]] = field(default_factory=list)
    """Results of each step: the engine's, plain torch's."""
    gradients: list[float] = field(default_factory=list)
    """Error of the gradient that a user reads before the update, relative to the largest."""
    masters: list[float] = field(default_factory=list)
    """Error of the master weights after the update in terms of its bound."""
    copies_equal: bool = True
    """The model computes with the masters rounded to bf16."""
    by_autograd: set[str] = field(default_factory=set)
    """Parameters whose gradient autograd made."""

    def note_gradient(self, name: str, gradient: Tensor | None) -> None:
        if gradient is not None:
            self.by_autograd.add(name)


class Plain:
    """The same model with fp32 masters and torch's AdamW, and no DeepSpeed."""

    def __init__(self, run: RunConfig, groups: Groups) -> None:
        self.model = build_model(run.model, run.parallel, groups, torch.bfloat16, run.run.seed)
        self.masters = {weight: weight.detach().float() for weight in self.model.parameters()}
        self.optimizer = build_optimizer(self.model, run.optim)
        for group in self.optimizer.param_groups:
            group["params"] = [self.masters[weight] for weight in group["params"]]

    def gradients(self, batches: list[MicroBatch], weights: list[Tensor]) -> None:
        """Set the masters, and their gradients on all batches."""
        for (weight, master), wanted in zip(self.masters.items(), weights, strict=True):
            master.copy_(wanted)
            weight.data.copy_(wanted)
            master.grad = torch.zeros_like(master)
        for batch in batches:
            (self.model(batch.tokens, labels=batch.labels) / len(batches)).backward()
            for weight, master in self.masters.items():
                if weight.grad is not None:
                    master.grad += weight.grad
                weight.grad = None

    def update(self) -> float:
        grads = [master.grad for master in self.masters.values()]
        norm = sum(grad.double().square().sum() for grad in grads).sqrt().item()
        for grad in grads:
            grad *= min(1.0, CLIP / (norm + 1e-6))
        self.optimizer.step()
        return norm


def train(run: RunConfig, groups: Groups) -> Found:
    """Two steps, one whose gradient is not finite, one in which a parameter gets no gradient, and another."""
    found, plain = Found(), Plain(run, groups)
    model = build_model(run.model, run.parallel, groups, torch.bfloat16, run.run.seed)
    theirs = build_engine(model, run.zero, run.train, run.optim, groups)
    for name, weight in model.named_parameters():
        weight.register_hook(partial(found.note_gradient, name))
    for step in range(2):
        compare(found, theirs, plain, groups, step)
    skip(found, theirs, groups)
    for step, has_gradient in ((2, False), (3, True)):
        for each in (model, plain.model):
            each.get_parameter(NORM).requires_grad_(has_gradient)
        compare(found, theirs, plain, groups, step)
    return found


def compare(found: Found, theirs: DeepSpeedEngine, plain: Plain, groups: Groups, step: int) -> None:
    batches = micro_batches(step)
    plain.gradients(batches, masters(theirs))
    read = []

    def read_gradients() -> None:
        read.extend(safe_get_full_grad(weight).float() for weight in theirs.module.parameters())

    result = train_step(
        theirs, batches[groups.dp_rank :: groups.dp_size], LR, groups, before_update=read_gradients
    )
    expected = [master.grad.clone() for master in plain.masters.values()]
    found.gradients.append(max(relative(ours, grad) for ours, grad in zip(read, expected, strict=True)))
    found.norms.append((result.grad_norm, plain.update()))
    bound = (10 + 4 + 14 / (1 - 0.95)) * EPS * LR
    found.masters.append(
        max(
            largest(ours - master) / (bound + 2 * EPS * largest(master))
            for ours, master in zip(masters(theirs), plain.masters.values(), strict=True)
        )
    )
    check_copies(found, theirs)


def skip(found: Found, theirs: DeepSpeedEngine, groups: Groups) -> None:
    before = everything(theirs)
    spoilt = theirs.module.get_parameter(NORM).register_hook(lambda grad: grad * torch.nan)
    result = train_step(theirs, micro_batches(9)[groups.dp_rank :: groups.dp_size], LR, groups)
    spoilt.remove()
    assert result.skipped
    assert all(map(torch.equal, everything(theirs), before))


def everything(theirs: DeepSpeedEngine) -> list[Tensor]:
    """Bits of what a skipped step must not change: masters, moments, step counts, weights."""
    inner = theirs.optimizer.optimizer
    kept = [tensor for state in inner.state.values() for tensor in state.values()]
    kept += [master for group in inner.param_groups for master in group["params"]]
    return [tensor.detach().clone() for tensor in (*kept, *theirs.module.parameters())]


def check_copies(found: Found, theirs: DeepSpeedEngine) -> None:
    pairs = zip(masters(theirs), theirs.module.parameters(), strict=True)
    found.copies_equal &= all(torch.equal(master.bfloat16(), weight) for master, weight in pairs)


def masters(theirs: DeepSpeedEngine) -> list[Tensor]:
    return [full_fp32_weight(weight) for weight in theirs.module.parameters()]


def micro_batches(step: int) -> list[MicroBatch]:
    tokens = torch.randint(92, (MICRO_BATCHES, 2, 9), generator=torch.Generator().manual_seed(step))
    return [MicroBatch(part[:, :-1], part[:, 1:]) for part in tokens]


def largest(x: Tensor) -> float:
    return x.detach().abs().max().item()


def relative(x: Tensor, expected: Tensor) -> float:
    return largest(x - expected) / max(largest(expected), 1e-30)


def config(stage: int, recompute: str, tied: bool, **settings: Any) -> RunConfig:
    return run_config(
        Path("unused"),
        UNEVEN,
        model={"recompute": recompute, "tie_embeddings": tied},
        zero={"stage": stage} | settings,
        train={
            "precision": "bf16",
            "micro_batch_size": 2,
            "global_batch_size": 2 * MICRO_BATCHES,
        },
        optim={"lr": LR, "clip_grad": CLIP},
    )


def all_cases() -> dict[str, Found]:
    with process_groups(ParallelConfig(), seed=0) as groups:
        return {name: train(config(*case), groups) for name, case in CASES.items()}


def on_two_ranks(bucket: Path) -> dict[str, Found]:
    with process_groups(ParallelConfig(), seed=0) as groups:
        return {
            "zero1": train(config(1, "selective", False), groups),
            "zero2": train(config(2, "selective", False), groups),
            "zero2 with small buckets": train(config(2, "selective", False, config=str(bucket)), groups),
        }


@pytest.fixture(scope="module")
def alone() -> dict[str, Found]:
    return call(all_cases)


def check(found: Found) -> None:
    for norm, expected in found.norms:
        assert norm == pytest.approx(expected, rel=NORM_ERROR)
        assert norm > CLIP  # or clipping would not show
    assert found.gradients == [0.0] * len(found.norms)
    assert max(found.masters) < 1
    assert found.copies_equal


@pytest.mark.process
@pytest.mark.parametrize("case", [case for case in CASES if case not in TIED])
def test_each_step_is_that_of_plain_torch(alone: dict[str, Found], case: str) -> None:
    check(alone[case])


@pytest.mark.process
@pytest.mark.parametrize("case", TIED)
def test_both_gradients_of_a_tied_embedding_count(alone: dict[str, Found], case: str) -> None:
    """Plain torch rounds their sum to bf16, the product does not."""
    found = alone[case]
    assert max(found.gradients) < 2.0**-8
    assert [norm for norm, _ in found.norms] == pytest.approx([norm for _, norm in found.norms], rel=2.0**-8)
    assert found.copies_equal


@pytest.mark.process
def test_each_step_is_that_of_plain_torch_on_two_ranks(tmp_path: Path) -> None:
    small = tmp_path / "small.json"
    small.write_text('{"zero_optimization": {"overlap_comm": true, "reduce_bucket_size": 1500}}')
    for ranks in zip(*(found.values() for found in run_ranks(2, on_two_ranks, small)), strict=True):
        for found in ranks:
            check(found)


@pytest.mark.process
@pytest.mark.parametrize("stage", [1, 2])
def test_gradients_of_the_layers_matrices_are_not_made_by_autograd(
    alone: dict[str, Found], stage: int
) -> None:
    assert not any("linear" in name for name in alone[f"zero{stage}-selective"].by_autograd)
    assert any("linear" in name for name in alone[f"zero{stage}-none"].by_autograd)


class Stream:
    """Stands for a stream: notes what is queued where."""

    def __init__(self, name: str, queued: list[str]) -> None:
        self.name, self.queued = name, queued
        self.events = 0

    def wait_stream(self, other: "Stream") -> None:
        self.queued.append(f"{self.name} waits for {other.name}")

    def record_event(self) -> str:
        self.events += 1
        return f"bucket {self.events} reduced"

    def wait_event(self, event: str) -> None:
        self.queued.append(f"{self.name} waits until {event}")


def queued_in_a_backward() -> list[str]:
    """Order of fills, reductions and waits in a backward whose buckets hold one matrix, as on a GPU."""
    queued: list[str] = []
    main, side = Stream("backward", queued), Stream("reduction", queued)
    with process_groups(ParallelConfig(), seed=0) as groups:
        run = config(2, "selective", False)
        model = build_model(run.model, run.parallel, groups, torch.bfloat16, run.run.seed)
        optimizer = build_engine(model, run.zero, run.train, run.optim, groups).optimizer
        optimizer.reduction_stream, optimizer.overlap_comm = side, True
        weights = [weight for name, weight in model.named_parameters() if "linear_fc2" in name] * 2
        optimizer._bucket_size = weights[0].numel()
        accelerator = SimpleNamespace(current_stream=lambda: main, stream=lambda stream: nullcontext())
        with (
            patch.object(zero, "get_accelerator", lambda: accelerator),
            patch.object(Stage2, "_reduce", lambda *_: queued.append("reduction reduces")),
        ):
            for weight in weights:
                optimizer.place(weight)
                queued.append("backward fills")
                optimizer.filled(weight)
            optimizer.independent_gradient_partition_epilogue()
    return queued


@pytest.mark.process
def test_a_bucket_is_reduced_beside_the_backward() -> None:
    """The two only wait where one needs what the other has made, or would overwrite what it reads."""
    fills, reduces = "backward fills", ["reduction waits for backward", "reduction reduces"]
    assert call(queued_in_a_backward) == [
        *(fills, *reduces),
        *(fills, *reduces, "backward waits until bucket 1 reduced"),
        *(fills, *reduces, "backward waits until bucket 2 reduced"),
        *(fills, *reduces, "backward waits until bucket 3 reduced"),
        "backward waits for reduction",
    ]


SOURCES: dict[Any, dict[str, str]] = {
    bf16_optimizer.BF16_Optimizer: {
        "_setup_for_real_optimizer": "d5c428fde575",
        "step": "9b21d4a28f87",
        "clear_hp_grads": "82cb16a0c5b9",
        "zero_grad": "d071d3bc77f2",
        "_update_hp_grad": "026f6bb3edea",
        "accumulate_hp_grads_and_remove_lp": "4792e4da4c69",
    },
    stage_1_and_2.DeepSpeedZeroOptimizer: {
        "step": "9520884fd916",
        "zero_grad": "f303979da7ba",
        "process_gradients": "a05fe9cac73c",
        "independent_gradient_partition_epilogue": "26ceef6d75b3",
        "initialize_gradient_partition": "c9639269026c",
        "_build_compact_grad_partition_buffer": "54c896878ee9",
        "create_gradient_handling_hooks": "b84ceb8d3356",
    },
    engine.DeepSpeedEngine: {
        "allreduce_gradients": "89aab0f80f1a",
        "_backward_epilogue": "5d52976af041",
        "_take_model_step": "c4c6e01aa1fc",
    },
    utils: {
        "all_gather_dp_groups": "87c5e3c4215b",
    },
}


@pytest.mark.parametrize("owner", SOURCES, ids=lambda owner: owner.__name__)
def test_deepspeeds_functions_are_those_that_were_read(owner: Any) -> None:
    """Functions that are replaced, and those that call the replacements: others have to be read again."""
    sources = {name: inspect.getsource(getattr(owner, name)) for name in SOURCES[owner]}
    found = {name: hashlib.sha256(source.encode()).hexdigest()[:12] for name, source in sources.items()}
    assert found == SOURCES[owner], deepspeed.__version__
