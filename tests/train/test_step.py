"""llama_mcore.train.step through real engines: an update that must not happen, and evaluation."""

import gc
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from llama_mcore.config.schema import RunConfig
from llama_mcore.data.loader import MicroBatch
from llama_mcore.distributed.config import ParallelConfig
from llama_mcore.distributed.groups import Groups, process_groups
from llama_mcore.model.build import build_model
from llama_mcore.train.engine import DeepSpeedEngine, build_engine, dtype_of, full_fp32_weight
from llama_mcore.train.step import PendingResult, Step, evaluate, mean_loss, train_step
from tests.support.models import run_config
from tests.support.world import call

pytestmark = pytest.mark.process

UPDATE = "finish_micro_batch"
OF_ZERO = (UPDATE, "backward", "fetch_sub_module")
"""Functions that update weights, reduce gradients and gather weights."""
CASES = {
    f"{precision}-zero{stage}": (precision, stage) for precision in ("bf16", "fp32") for stage in (1, 2, 3)
}


def steps_of_all_cases() -> dict[str, dict[str, Any]]:
    """Steps of all cases, run in one process."""
    with process_groups(ParallelConfig(), seed=1) as groups:
        return {name: steps(config(*case), groups) for name, case in CASES.items()}


def config(precision: str, stage: int) -> RunConfig:
    batch = {"micro_batch_size": 2, "global_batch_size": 4}
    return run_config(Path("unused"), train=batch | {"precision": precision}, zero={"stage": stage})


def steps(run: RunConfig, groups: Groups) -> dict[str, Any]:
    """Three, the second of which has a gradient that is not finite, and an evaluation."""
    model = build_model(run.model, run.parallel, groups, dtype_of(run.train), run.run.seed)
    engine = build_engine(model, run.zero, run.train, run.optim, groups)
    results = [take_step(engine, groups)]
    with_nan = model.decoder.final_layernorm.weight.register_hook(lambda gradient: gradient * float("nan"))
    results.append(take_step(engine, groups))
    with_nan.remove()
    results.append(take_step(engine, groups))
    return {
        "steps": results,
        "calls": calls_of_a_step(engine, groups),
        "evaluation": evaluation(engine, groups),
        "queued": [queued(engine, groups, with_mask) for with_mask in (False, True)],
        "garbage": garbage_of_steps(engine, groups),
        "gathered": gathered_when_discarded(engine, groups),
    }


def take_step(engine: DeepSpeedEngine, groups: Groups) -> dict[str, Any]:
    before = state(engine)
    result = train_step(engine, batches(2), 1e-2, groups)
    after = state(engine)
    return {
        "changed": not all(torch.equal(*pair) for pair in zip(before, after, strict=True)),
        "finite": all(bool(tensor.isfinite().all()) for tensor in after),
        "skipped": result.skipped,
        "grad_norm_finite": result.grad_norm < float("inf"),
    }


def calls_of_a_step(engine: DeepSpeedEngine, groups: Groups) -> list[str]:
    """Calls of `train_step` in two micro-batches, and when the weights have changed."""
    seen, before = [], state(engine)

    def called(name: str) -> None:
        same = all(torch.equal(*pair) for pair in zip(before, state(engine), strict=True))
        seen.append(name if same else f"{name}, weights changed")

    beat, before_update = (lambda name=name: called(name) for name in ("beat", "before update"))
    train_step(engine, batches(2), 1e-2, groups, beat=beat, before_update=before_update)
    return seen


class Calls(TorchDispatchMode):
    """Collectives but for ZeRO's, and reads of a value by the host, which waits for its device; the update is
    left out."""

    def __init__(self) -> None:
        super().__init__()
        self.collectives: list[str] = []
        self.reads: list[str] = []

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, stack = str(operator), traceback.extract_stack()
        callers = {frame.name for frame in stack}
        if name.startswith("c10d") and callers.isdisjoint(OF_ZERO):
            self.collectives.append(name.split(".")[1])
        if "_local_scalar_dense" in name and UPDATE not in callers:
            self.reads += traceback.format_list(stack)[-2:-1]
        return operator(*args, **(kwargs or {}))


def queued(engine: DeepSpeedEngine, groups: Groups, with_mask: bool) -> dict[str, Any]:
    """Calls of a step until its result is on its way, and how often that is read in the end."""
    micro_batches = batches(2)
    if with_mask:
        micro_batches = [replace(batch, loss_mask=torch.ones(batch.labels.shape)) for batch in micro_batches]
    with Calls() as calls:
        pending = PendingResult(Step(engine, micro_batches, groups).finish(1e-2), groups)
    with Calls() as at_the_end:
        pending.wait()
    return {
        "collectives": calls.collectives,
        "reads": calls.reads,
        "reads at the end": len(at_the_end.reads),
    }


def gathered_when_discarded(engine: DeepSpeedEngine, groups: Groups) -> list[int]:
    """Elements of weights that this rank holds before a step begins, then, and when it is discarded."""

    def held() -> int:
        return sum(parameter.numel() for parameter in engine.module.parameters())

    before, step = held(), Step(engine, batches(2), groups)
    begun = held()
    step.discard()
    return [before, begun, held()]


def garbage_of_steps(engine: DeepSpeedEngine, groups: Groups) -> list[str]:
    """Types of what steps leave to the collector, which seldom comes."""
    gc.collect()
    gc.set_debug(gc.DEBUG_SAVEALL)
    for _ in range(3):
        take_step(engine, groups)
    gc.collect()
    gc.set_debug(0)
    return sorted({type(each).__name__ for each in gc.garbage})


def evaluation(engine: DeepSpeedEngine, groups: Groups) -> dict[str, Any]:
    with torch.no_grad():
        one_by_one = [mean_loss(engine, batch, groups).item() for batch in batches(3)]
    before = state(engine)
    found, tokens = evaluate(engine, batches(3), groups)
    return {
        "expected": sum(one_by_one) / 3,
        "found": found,
        "tokens": tokens,
        "changed": not all(torch.equal(*pair) for pair in zip(before, state(engine), strict=True)),
        "training_goes_on": engine.module.training,
    }


def state(engine: DeepSpeedEngine) -> list[Tensor]:
    return [full_fp32_weight(parameter).clone() for parameter in engine.module.parameters()]


def batches(count: int) -> list[MicroBatch]:
    tokens = torch.randint(64, (count, 2, 9), generator=torch.Generator().manual_seed(1))
    return [MicroBatch(part[:, :-1], part[:, 1:]) for part in tokens]


@pytest.fixture(scope="module")
def results() -> dict[str, dict[str, Any]]:
    return call(steps_of_all_cases)


@pytest.mark.parametrize("case", CASES)
def test_a_gradient_that_is_not_finite_changes_no_weight(results: dict[str, Any], case: str) -> None:
    """The step says so, and the next one goes on."""
    before, with_nan, after = results[case]["steps"]
    good = {"changed": True, "finite": True, "skipped": False, "grad_norm_finite": True}
    assert with_nan == {"changed": False, "finite": True, "skipped": True, "grad_norm_finite": False}
    assert before == after == good


@pytest.mark.parametrize("case", CASES)
def test_what_has_to_be_before_the_update_is_after_all_backwards(results: dict[str, Any], case: str) -> None:
    """A checkpoint is copied until then."""
    beats = ["beat", "beat", "beat"]  # after two backwards, and the first added up
    assert results[case]["calls"] == [*beats, "before update", "beat, weights changed"]


@pytest.mark.parametrize("case", CASES)
def test_a_step_is_queued_without_waiting_for_the_device(results: dict[str, Any], case: str) -> None:
    """With one collective of its own: for its result; and one for the weights of masked micro-batches."""
    plain, masked = results[case]["queued"]
    assert plain == {"collectives": ["allreduce_"], "reads": [], "reads at the end": 1}
    assert masked == plain | {"collectives": ["allreduce_", "allreduce_"]}


@pytest.mark.parametrize("case", [case for case in CASES if case.endswith("zero3")])
def test_a_step_that_is_discarded_leaves_no_weight_gathered(results: dict[str, Any], case: str) -> None:
    before, begun, discarded = results[case]["gathered"]
    assert before == discarded == 0 < begun


@pytest.mark.parametrize("case", CASES)
def test_a_step_leaves_nothing_to_the_garbage_collector(results: dict[str, Any], case: str) -> None:
    assert "Tensor" not in results[case]["garbage"]
    assert "Parameter" not in results[case]["garbage"]


@pytest.mark.parametrize("case", CASES)
def test_evaluation_is_the_mean_and_changes_nothing(results: dict[str, Any], case: str) -> None:
    found = results[case]["evaluation"]
    assert found["found"] == pytest.approx(found["expected"], rel=1e-6)
    assert found["tokens"] == 3 * 2 * 8
    assert not found["changed"]
    assert found["training_goes_on"]
