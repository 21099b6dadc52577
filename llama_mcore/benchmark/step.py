"""`step`: a training step of our model beside megatron-core's own layers and Hugging Face.

One contender at a time is on the device, so that its memory is its own. In every round each is built, warmed
up and timed; rounds alternate between them, so that what else the machine does meets all alike.
"""

import gc
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

import torch
from pydantic import ValidationError

from llama_mcore.benchmark.memory import kept_bytes
from llama_mcore.benchmark.models import CONTENDERS, Contender, Workload, benchmark_run, random_batch
from llama_mcore.benchmark.runner import Bar, OtherWork, Result, say
from llama_mcore.config.checks import check_config
from llama_mcore.distributed.device import (
    device_name,
    on_gpu,
    peak_memory_bytes,
    release_cached_memory,
    reset_peak_memory,
    seconds_of,
)
from llama_mcore.distributed.groups import process_groups
from llama_mcore.errors import ConfigError, Problem
from llama_mcore.model.config import PRESETS, ModelConfig
from llama_mcore.plan.layout.flops import mfu, token_flops
from llama_mcore.plan.layout.hardware import Peak, peak_of

# 58M parameters: what two CPU cores step through in seconds.
CPU_SHAPE = {
    "num_layers": 8,
    "hidden_size": 512,
    "num_attention_heads": 8,
    "ffn_hidden_size": 1376,
    "vocab_size": 32000,
    "seq_length": 512,
}
CPU_MICRO_BATCH = 4

CPU_BARS = (
    Bar("forward+backward, ours / huggingface", "at most", 0.80),
    Bar("forward+backward, ours / mcore", "at most", 0.80),
    Bar("full step, ours / huggingface", "at most", 0.90),
    Bar("activation memory, ours / huggingface", "below", 1.0),
    Bar("activation memory, ours / mcore", "below", 1.0),
)
H200_BARS = (Bar("MFU, ours", "at least", 0.55),)

MIB = 2**20
QUIET = 0.05
"""Share of the CPU that other processes may use before times are doubted."""


@dataclass(frozen=True)
class Request:
    """Measurement to make."""

    model: ModelConfig
    micro_batch_size: int
    rounds: int = 5
    repeats: int = 2
    contenders: Sequence[str] = tuple(CONTENDERS)


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


def request(
    preset: str | None,
    fields: dict[str, int | str | None],
    micro_batch_size: int | None,
    rounds: int,
    repeats: int,
    contenders: Sequence[str] | None,
) -> Request:
    """Request of a command line: a preset or the CPU shape, with the fields that are not None.

    Raises ConfigError for what is not known or does not fit together.
    """
    chosen = tuple(contenders or CONTENDERS)
    problems = [
        Problem("--contender", name, "is not known", f"known: {', '.join(CONTENDERS)}")
        for name in chosen
        if name not in CONTENDERS
    ]
    if preset is not None and preset not in PRESETS:
        problems.append(Problem("--model", preset, "is not a preset", f"known: {', '.join(PRESETS)}"))
    if problems:
        raise ConfigError(problems)
    given = {name: value for name, value in fields.items() if value is not None}
    base = dict(PRESETS[preset] if preset else CPU_SHAPE)
    if "hidden_size" in given:
        base.pop("ffn_hidden_size", None)  # belongs to the width that it was stated for
    try:
        model = ModelConfig.model_validate(base | given)
    except ValidationError as error:
        raise ConfigError(
            [Problem(f"--{e['loc'][0]}".replace("_", "-"), e["input"], e["msg"]) for e in error.errors()]
        ) from None
    size = micro_batch_size or CPU_MICRO_BATCH
    check_config(benchmark_run(model, size), world_size=1)
    return Request(model, size, rounds, repeats, chosen)


def stated_bars(request: Request) -> Sequence[Bar]:
    """The bars for this shape on this device, if there are any."""
    shape = (request.model, request.micro_batch_size)
    if device_name() == "cpu" and shape == (ModelConfig.model_validate(CPU_SHAPE), CPU_MICRO_BATCH):
        return CPU_BARS
    if device_name() == "NVIDIA H200" and request.model == ModelConfig.model_validate(PRESETS["7b"]):
        return H200_BARS
    return ()


def measure(request: Request) -> Result:
    """Run the benchmark."""
    run = benchmark_run(request.model, request.micro_batch_size)
    batch = random_batch(request.model, request.micro_batch_size, run.run.seed)
    samples = {name: Samples() for name in request.contenders}
    others = OtherWork()
    with process_groups(run.parallel, run.run.seed) as groups:
        workload = Workload(run, groups, batch)
        for number in range(1, request.rounds + 1):
            for name, found in samples.items():
                _run_block(name, workload, request.repeats, found)
                gc.collect()  # an engine and its hooks refer to each other
                release_cached_memory()
                say(f"round {number}/{request.rounds}  {name:<12} {_newest(found)}")
    return summarize(request, samples, peak_of(device_name()), others.share())


def summarize(
    request: Request, samples: dict[str, Samples], peak: Peak | None, others_share: float
) -> Result:
    """Medians, ratios and what follows from them. `others_share`: see OtherWork."""
    flops = token_flops(request.model)
    tokens = request.micro_batch_size * request.model.seq_length
    speeds = {name: tokens / median(found.step_s) for name, found in samples.items() if found.step_s}
    shares = {
        name: (mfu(speed, flops.causal, peak.bf16_flops), mfu(speed, flops.full, peak.bf16_flops))
        for name, speed in speeds.items()
        if peak
    }
    quantities = _ratios(samples) | {f"MFU, {name}": causal for name, (causal, _) in shares.items()}
    return Result(
        benchmark="step",
        settings=_settings(request),
        table=[_row(name, found, speeds.get(name), shares.get(name)) for name, found in samples.items()],
        measured={name: asdict(found) for name, found in samples.items()}
        | {
            "tokens_per_s": speeds,
            "flops_per_token": asdict(flops),
            "other_processes_share_of_cpu": others_share,
        },
        quantities=quantities,
        figure=_figure(quantities, speeds),
        bars=stated_bars(request),
        notes=[_quietness(others_share), *_notes(request, peak)],
    )


def _run_block(name: str, workload: Workload, repeats: int, found: Samples) -> None:
    """Build one contender, add its measurements to `found`, release it."""
    if found.out_of_memory:
        return
    try:
        with closing(CONTENDERS[name](workload)) as contender:
            _measure_contender(contender, repeats, found)
    except torch.OutOfMemoryError:
        found.out_of_memory = True


def _measure_contender(contender: Contender, repeats: int, found: Samples) -> None:
    """Time a contender, after a pass of each kind that fills caches and makes the Adam states."""
    module = contender.module
    found.activation_bytes, loss = kept_bytes(contender.loss, module.parameters())
    loss.backward()
    del loss
    module.zero_grad(set_to_none=True)
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


def _ratios(samples: dict[str, Samples]) -> dict[str, float]:
    """Ours divided by each other contender, smaller is better; only of what both measured."""
    ours = _summary(samples["ours"]) if "ours" in samples else {}
    return {
        f"{quantity}, ours / {name}": value / theirs[quantity]
        for name, found in samples.items()
        if name != "ours" and (theirs := _summary(found))
        for quantity, value in ours.items()
        if quantity in theirs
    }


def _summary(found: Samples) -> dict[str, float]:
    summary: dict[str, float] = {}
    if found.forward_backward_s:
        summary["forward+backward"] = median(found.forward_backward_s)
    if found.step_s:
        summary["full step"] = median(found.step_s)
    if found.activation_bytes:
        summary["activation memory"] = found.activation_bytes
    if found.peak_bytes:
        summary["peak memory"] = found.peak_bytes
    return summary


def _row(
    name: str, found: Samples, speed: float | None, shares: tuple[float, float] | None
) -> dict[str, str]:
    full_step = "out of memory" if found.out_of_memory else _spread(found.step_s)
    row = {
        "": name,
        "forward+backward, s": _spread(found.forward_backward_s),
        "full step, s": full_step,
        "tokens/s": f"{speed:,.0f}" if speed else "",
        "activations, MiB": f"{found.activation_bytes / MIB:,.0f}",
    }
    if on_gpu():
        row["peak, MiB"] = f"{found.peak_bytes / MIB:,.0f}"
        row["MFU causal (full)"] = f"{shares[0]:.1%} ({shares[1]:.1%})" if shares else ""
    return row


def _spread(seconds: Sequence[float]) -> str:
    """Median and range."""
    return f"{median(seconds):.3f} ({min(seconds):.3f} to {max(seconds):.3f})" if seconds else ""


def _newest(found: Samples) -> str:
    if found.out_of_memory:
        return "out of memory"
    return f"forward+backward {found.forward_backward_s[-1]:.3f} s, full step {found.step_s[-1]:.3f} s"


def _settings(request: Request) -> dict[str, Any]:
    model = request.model
    return {
        "parameters": f"{model.num_params() / 1e6:,.1f}M",
        "layers": model.num_layers,
        "hidden": model.hidden_size,
        "heads": f"{model.num_attention_heads}/{model.num_query_groups} x {model.head_dim}",
        "ffn": model.ffn_hidden_size,
        "vocabulary": model.vocab_size,
        "sequence": model.seq_length,
        "batch": request.micro_batch_size,
        "recompute": model.recompute,
        "attention": model.attention,
        "rounds x repeats": f"{request.rounds} x {request.repeats}",
    }


def _quietness(others_share: float) -> str:
    doubt = ": repeat on a quiet machine, the times are not to be trusted" if others_share > QUIET else ""
    return f"other processes used {others_share:.0%} of the CPU meanwhile{doubt}"


def _notes(request: Request, peak: Peak | None) -> list[str]:
    if not on_gpu():
        return []
    if peak is None:
        return [f"no MFU: the peak of {device_name()!r} is not known"]
    flops = token_flops(request.model)
    return [
        "MFU = tokens/s * flops per token / peak; causal: 6 Nmm + 6 L n d s, full: 6 Nmm + 12 L n d s",
        f"flops per token {flops.causal / 1e9:.2f} G (full {flops.full / 1e9:.2f} G), "
        f"peak {peak.bf16_flops / 1e12:g} TFLOP/s ({peak.source})",
    ]


def _figure(quantities: dict[str, float], speeds: dict[str, float]) -> str:
    ratios = [
        f"{quantity} {value:.3f}"
        for quantity, value in quantities.items()
        if quantity.startswith(("forward+backward", "full step", "MFU, ours"))
    ]
    return "; ".join(ratios or [f"tokens/s, {name} {speed:,.0f}" for name, speed in speeds.items()])
