"""`step`: a training step of our model beside megatron-core's own layers, Hugging Face and others' recipes.

One contender at a time is on the device, so that its memory is its own. In every round each is built, warmed
up and timed; rounds alternate between them, so that what else the machine does meets all alike. Beside
another checkout of this repository (`--before`) both run in processes of their own, by turns.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from pydantic import ValidationError

from llama_mcore.benchmark import step_bars
from llama_mcore.benchmark.checkout import check_checkout
from llama_mcore.benchmark.models import benchmark_run
from llama_mcore.benchmark.runner import Bar, OtherWork, Result, quietness
from llama_mcore.benchmark.step_bars import CPU_MICRO_BATCH
from llama_mcore.benchmark.step_samples import BEFORE, CONTENDERS, QUICK, Samples, beside, in_turns
from llama_mcore.config.checks import check_config
from llama_mcore.distributed.device import device_name, on_gpu
from llama_mcore.errors import ConfigError, Problem
from llama_mcore.model.config import PRESETS, ModelConfig
from llama_mcore.plan.layout.flops import mfu, token_flops
from llama_mcore.plan.layout.hardware import Peak, peak_of

MIB = 2**20
STATES_NOTE = "states: precision of weights / gradients / Adam's moments / masters"


@dataclass(frozen=True)
class Request:
    """Measurement to make."""

    model: ModelConfig
    micro_batch_size: int
    rounds: int = 7
    repeats: int = 2
    contenders: Sequence[str] = QUICK
    accumulation: int = 1
    """Micro-batches of a full step."""
    before: Path | None = None
    """Another checkout: ours is measured beside it."""
    words: Sequence[str] = ()
    """Options of the command line that ask for the same of one contender in one round."""


def request(
    preset: str | None,
    fields: dict[str, int | str | None],
    micro_batch_size: int | None = None,
    rounds: int = Request.rounds,
    repeats: int = Request.repeats,
    contenders: Sequence[str] | None = None,
    accumulation: int = 1,
    before: Path | None = None,
) -> Request:
    """Request of a command line: a preset or the CPU shape, with the fields that are not None.

    Raises ConfigError for what is not known or does not fit together.
    """
    chosen = tuple(contenders or (("ours",) if before else CONTENDERS if on_gpu() else QUICK))
    problems = [
        Problem("--contender", name, "is not known", f"known: {', '.join(CONTENDERS)}")
        for name in chosen
        if name not in CONTENDERS
    ]
    if preset is not None and preset not in PRESETS:
        problems.append(Problem("--model", preset, "is not a preset", f"known: {', '.join(PRESETS)}"))
    if before and chosen != ("ours",):
        reason = "is not measured beside another checkout"
        problems.append(Problem("--contender", ", ".join(chosen), reason, "leave it out, or --before"))
    if problems:
        raise ConfigError(problems)
    if before:
        check_checkout("--before", before)
    given = {name: value for name, value in fields.items() if value is not None}
    base = dict(PRESETS[preset] if preset else step_bars.CPU_SHAPE)
    if "hidden_size" in given:
        base.pop("ffn_hidden_size", None)  # belongs to the width that it was stated for
    try:
        model = ModelConfig.model_validate(base | given)
    except ValidationError as error:
        raise ConfigError(
            [Problem(_option(str(e["loc"][0])), e["input"], e["msg"]) for e in error.errors()]
        ) from None
    size = micro_batch_size or CPU_MICRO_BATCH
    check_config(benchmark_run(model, size, accumulation), world_size=1)
    options: dict[str, int | str] = {"--model": preset} if preset else {}
    options |= {_option(name): value for name, value in given.items()}
    options |= {"--micro-batch-size": size, "--repeats": repeats}
    if accumulation > 1:  # an older checkout has no such option
        options["--accumulation"] = accumulation
    words = [word for option, value in options.items() for word in (option, str(value))]
    return Request(model, size, rounds, repeats, chosen, accumulation, before, words)


def _option(field: str) -> str:
    return f"--{field}".replace("_", "-")


def stated_bars(request: Request) -> Sequence[Bar]:
    """The bars for this shape on this device, of those that are stated about what is measured."""
    measured = (BEFORE,) if request.before else request.contenders
    shape = (request.model, request.micro_batch_size, request.accumulation)
    bars = step_bars.stated_bars(device_name(), *shape, before=request.before is not None)
    return tuple(bar for bar in bars if bar.quantity.partition(" / ")[2] in ("", *measured))


def measure(request: Request) -> Result:
    """Run the benchmark."""
    others = OtherWork()
    if request.before:
        samples = beside(request.before, request.words, request.rounds)
    else:
        run = benchmark_run(request.model, request.micro_batch_size, request.accumulation)
        samples = in_turns(run, request.contenders, request.rounds, request.repeats)
    return summarize(request, samples, peak_of(device_name()), others.share())


def summarize(
    request: Request, samples: dict[str, Samples], peak: Peak | None, others_share: float
) -> Result:
    """Medians, ratios and what follows from them. `others_share`: see OtherWork."""
    flops = token_flops(request.model)
    tokens = request.micro_batch_size * request.model.seq_length
    speeds = {
        name: tokens * request.accumulation / median(found.step_s)
        for name, found in samples.items()
        if found.step_s
    }
    shares = {
        name: (mfu(speed, flops.causal, peak.bf16_flops), mfu(speed, flops.full, peak.bf16_flops))
        for name, speed in speeds.items()
        if peak
    }
    quantities = _ratios(samples) | {f"MFU, {name}": causal for name, (causal, _) in shares.items()}
    for name, found in samples.items():
        if peak and found.forward_backward_s:
            speed = tokens / median(found.forward_backward_s)
            quantities[f"MFU of forward+backward, {name}"] = mfu(speed, flops.causal, peak.bf16_flops)
        if found.peak_bytes:
            quantities[f"peak memory of {name}, GiB"] = found.peak_bytes / 2**30
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
        notes=[quietness(others_share), STATES_NOTE, *_notes(request, peak)],
    )


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
    row = {
        "": name,
        "states": found.states,
        "forward+backward, s": _spread(found.forward_backward_s),
        "full step, s": found.why_not or ("out of memory" if found.out_of_memory else _spread(found.step_s)),
        "tokens/s": f"{speed:,.0f}" if speed else "",
        "activations, MiB": _mebibytes(found.activation_bytes),
    }
    if on_gpu():
        row["peak, MiB"] = _mebibytes(found.peak_bytes)
        row["MFU causal (full)"] = f"{shares[0]:.1%} ({shares[1]:.1%})" if shares else ""
    return row


def _mebibytes(count: int) -> str:
    return f"{count / MIB:,.0f}" if count else ""


def _spread(seconds: Sequence[float]) -> str:
    """Median and range."""
    return f"{median(seconds):.3f} ({min(seconds):.3f} to {max(seconds):.3f})" if seconds else ""


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
        "accumulation": request.accumulation,
        "recompute": model.recompute,
        "attention": model.attention,
        "rounds x repeats": f"{request.rounds} x {request.repeats}",
    }


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
