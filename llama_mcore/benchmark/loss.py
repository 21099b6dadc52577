"""`loss`: output layer and cross-entropy, forward and backward, beside the three matrix products in them.

On a GPU at the 7B's shape and micro-batch 2, elsewhere at that of `step`. The products are those of all
tokens at once: logits, the gradient of the hidden states, and that of the weight.
"""

from collections.abc import Callable, Sequence
from functools import partial
from statistics import median

import torch
from torch import Tensor

from llama_mcore.benchmark.models import benchmark_run, random_batch
from llama_mcore.benchmark.runner import Bar, OtherWork, Result, quietness, say
from llama_mcore.benchmark.step_bars import CPU_MICRO_BATCH, CPU_SHAPE
from llama_mcore.config.schema import RunConfig
from llama_mcore.distributed.device import on_gpu, seconds_of
from llama_mcore.distributed.groups import Groups, process_groups
from llama_mcore.model.build import build_model
from llama_mcore.model.config import PRESETS, ModelConfig
from llama_mcore.train.engine import dtype_of

LOSS, PRODUCTS = "loss", "three products"
RATIO = "loss / its three products"
GPU_BARS = (Bar(RATIO, "at most", 1.3),)
REPEATS = 5
"""Timed passes in one round, as one measurement."""


def stated_bars() -> Sequence[Bar]:
    """The bars on this device."""
    return GPU_BARS if on_gpu() else ()


def default_run() -> RunConfig:
    """A run of the shape that is measured on this device; of one layer, which is not used."""
    shape, size = (PRESETS["7b"], 2) if on_gpu() else (CPU_SHAPE, CPU_MICRO_BATCH)
    return benchmark_run(ModelConfig.model_validate(shape | {"num_layers": 1}), size)


def measure(run: RunConfig, rounds: int) -> Result:
    """Run the benchmark, both by turns."""
    others = OtherWork()
    seconds: dict[str, list[float]] = {LOSS: [], PRODUCTS: []}
    with process_groups(run.parallel, run.run.seed) as groups:
        works = {LOSS: _loss(run, groups), PRODUCTS: _products(run, groups)}
        for work in works.values():
            work()  # fills caches
        for number in range(1, rounds + 1):
            for name, work in works.items():
                seconds[name].append(seconds_of(partial(_repeat, work)) / REPEATS)
                say(f"round {number}/{rounds}  {name:<14} {seconds[name][-1] * 1e3:.2f} ms")
    return summarize(run, seconds, others.share())


def _repeat(work: Callable[[], None]) -> None:
    for _ in range(REPEATS):
        work()


def summarize(run: RunConfig, seconds: dict[str, list[float]], others_share: float) -> Result:
    """Medians and their ratio. `others_share`: see OtherWork."""
    medians = {name: median(times) for name, times in seconds.items()}
    model, ratio = run.model, medians[LOSS] / medians[PRODUCTS]
    flops = 6 * run.train.micro_batch_size * model.seq_length * model.hidden_size * model.vocab_size
    return Result(
        benchmark="loss",
        settings={
            "tokens": run.train.micro_batch_size * model.seq_length,
            "hidden": model.hidden_size,
            "vocabulary": model.vocab_size,
            "rounds x repeats": f"{len(seconds[LOSS])} x {REPEATS}",
        },
        table=[
            {
                "": name,
                "ms": f"{medians[name] * 1e3:.2f} ({min(times) * 1e3:.2f} to {max(times) * 1e3:.2f})",
                "TFLOP/s": f"{flops / medians[name] / 1e12:.2f}",
            }
            for name, times in seconds.items()
        ],
        measured={"seconds": seconds, "other_processes_share_of_cpu": others_share},
        quantities={RATIO: ratio},
        figure=f"the loss takes {ratio:.2f} times its three products",
        bars=stated_bars(),
        notes=[quietness(others_share)],
    )


def _loss(run: RunConfig, groups: Groups) -> Callable[[], None]:
    """Forward and backward of our loss, to the gradients of hidden states and output weight."""
    model = build_model(run.model, run.parallel, groups, dtype_of(run.train), run.run.seed)
    layer = model.output_layer
    batch = random_batch(run.model, run.train.micro_batch_size, run.run.seed)
    labels = batch.labels.to(groups.device)
    hidden = _hidden(run, groups).requires_grad_()

    def work() -> None:
        layer(hidden, labels=labels).backward()
        hidden.grad = layer.weight.grad = None

    return work


def _products(run: RunConfig, groups: Groups) -> Callable[[], None]:
    """Logits [T, v], gradient of the hidden states [T, h], gradient of the weight [v, h]: a GEMM each."""
    tokens = _hidden(run, groups).flatten(0, 1)
    weight = torch.randn(run.model.vocab_size, run.model.hidden_size, device=groups.device).to(tokens.dtype)

    def work() -> None:
        logits = tokens @ weight.t()
        logits @ weight
        logits.t() @ tokens

    return work


def _hidden(run: RunConfig, groups: Groups) -> Tensor:
    """Random hidden states [s, b, h]."""
    shape = (run.model.seq_length, run.train.micro_batch_size, run.model.hidden_size)
    return torch.randn(shape, device=groups.device).to(dtype_of(run.train))
