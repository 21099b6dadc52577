"""Samples of `step`: contenders by turns in this process, or two checkouts each in processes of their own."""

import gc
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from llama_mcore.benchmark.checkout import THIS, measured_by
from llama_mcore.benchmark.memory import kept_bytes
from llama_mcore.benchmark.models import Contender, McoreContender, Workload, workload_of
from llama_mcore.benchmark.peers import (
    CompiledContender,
    HuggingFaceContender,
    LigerContender,
    TorchtitanContender,
    TransformerEngineContender,
    why_not_compiled,
    why_not_liger,
    why_not_transformer_engine,
)
from llama_mcore.benchmark.runner import say
from llama_mcore.config.schema import RunConfig
from llama_mcore.distributed.device import (
    on_gpu,
    peak_memory_bytes,
    release_cached_memory,
    reset_peak_memory,
    seconds_of,
)
from llama_mcore.distributed.groups import process_groups

CONTENDERS: dict[str, Callable[[Workload], Contender]] = {
    "ours": McoreContender,
    "mcore": partial(McoreContender, own_layer=False, recompute="none"),
    "mcore-te": TransformerEngineContender,
    "huggingface": HuggingFaceContender,
    "huggingface-compiled": CompiledContender,
    "torchtitan-recipe": TorchtitanContender,
    "liger": LigerContender,
}
QUICK = ("ours", "mcore", "huggingface")
"""Contenders on a CPU where none are named: the others need a GPU, or time to compile."""
BEFORE = "before"
WHY_NOT: dict[str, Callable[[], str]] = {
    "huggingface-compiled": why_not_compiled,
    "torchtitan-recipe": why_not_compiled,
    "liger": why_not_liger,
    "mcore-te": why_not_transformer_engine,
}
"""Name of a contender -> why it cannot run here; empty where it can."""


@dataclass
class Samples:
    """Measurements of one contender."""

    forward_backward_s: list[float] = field(default_factory=list)
    step_s: list[float] = field(default_factory=list)
    activation_bytes: int = 0
    """Bytes that autograd keeps between forward and backward."""
    peak_bytes: int = 0
    """Most that was allocated on the GPU during whole steps; 0 on a CPU."""
    out_of_memory: bool = False
    states: str = ""
    """Precision of weights / gradients / Adam's moments / masters."""
    why_not: str = ""
    """Why it does not run here."""


def in_turns(run: RunConfig, contenders: Sequence[str], rounds: int, repeats: int) -> dict[str, Samples]:
    """Every contender in this process, one at a time; rounds alternate between them."""
    samples = {name: Samples() for name in contenders}
    with process_groups(run.parallel, run.run.seed) as groups:
        workload = workload_of(run, groups)
        for number in range(1, rounds + 1):
            for name, found in samples.items():
                _run_block(name, workload, repeats, found)
                gc.collect()  # an engine and its hooks refer to each other
                release_cached_memory()
                say(f"round {number}/{rounds}  {name:<20} {_newest(found)}")
    return samples


def beside(before: Path, words: Sequence[str], rounds: int) -> dict[str, Samples]:
    """Ours of this checkout and of another, by turns, as `benchmark step WORDS` of each measures it.

    A sample is the best pass of one process.
    """
    checkouts = {"ours": THIS, BEFORE: before}
    samples = {name: Samples(states=McoreContender.states) for name in checkouts}
    for number in range(1, rounds + 1):
        # who comes first changes, so that a machine that slows down or speeds up favours neither
        for name in list(samples)[:: -1 if number % 2 == 0 else 1]:
            found, one = samples[name], measured_by(checkouts[name], words)
            if not one["out_of_memory"]:
                # what else the machine does only makes a pass slower
                found.forward_backward_s.append(min(one["forward_backward_s"]))
                found.step_s.append(min(one["step_s"]))
            found.activation_bytes, found.peak_bytes = one["activation_bytes"], one["peak_bytes"]
            found.out_of_memory |= one["out_of_memory"]
            say(f"round {number}/{rounds}  {name:<20} {_newest(found)}")
    return samples


def _run_block(name: str, workload: Workload, repeats: int, found: Samples) -> None:
    """Build one contender, add its measurements to `found`, release it."""
    found.why_not = WHY_NOT[name]() if name in WHY_NOT else ""
    if found.out_of_memory or found.why_not:
        return
    try:
        with closing(CONTENDERS[name](workload)) as contender:
            found.states = contender.states
            _measure_contender(contender, repeats, found)
    except torch.OutOfMemoryError:
        found.out_of_memory = True


def _measure_contender(contender: Contender, repeats: int, found: Samples) -> None:
    """Time a contender, after a pass of each kind that fills caches and makes the Adam states."""
    if contender.eager:
        found.activation_bytes, loss = kept_bytes(contender.loss, contender.module.parameters())
        loss.backward()
        del loss
        contender.module.zero_grad(set_to_none=True)
    else:
        _forward_backward(contender)
    for _ in range(repeats):
        found.forward_backward_s.append(seconds_of(lambda: _forward_backward(contender)))
    contender.add_optimizer()
    contender.step()
    reset_peak_memory()
    for _ in range(repeats):
        found.step_s.append(seconds_of(contender.step))
    found.peak_bytes = peak_memory_bytes() if on_gpu() else 0


def _forward_backward(contender: Contender) -> None:
    contender.loss().backward()
    contender.module.zero_grad(set_to_none=True)


def _newest(found: Samples) -> str:
    if found.why_not or found.out_of_memory:
        return found.why_not or "out of memory"
    return f"forward+backward {found.forward_backward_s[-1]:.3f} s, full step {found.step_s[-1]:.3f} s"
