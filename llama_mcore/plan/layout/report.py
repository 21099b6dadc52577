"""Output of `plan memory`, `plan layout` and `plan validate`: a conclusion and tables, or JSON.

Imports no torch.
"""

from collections.abc import Sequence
from typing import Any

from llama_mcore.config.schema import RunConfig
from llama_mcore.plan.layout.calibration import constants_of
from llama_mcore.plan.layout.efficiency import Efficiency
from llama_mcore.plan.layout.flops import token_flops
from llama_mcore.plan.layout.footprint import Footprint
from llama_mcore.plan.layout.hardware import GIB, Gpu
from llama_mcore.plan.layout.published import PUBLISHED
from llama_mcore.plan.layout.search import Cluster, Found, Option
from llama_mcore.plan.layout.validation import LARGEST_BAR, MEDIAN_BAR, Row, largest_error, median_error
from llama_mcore.plan.table import Grid, show
from llama_mcore.units import format_bytes, format_count

# --- memory


def memory_lines(found: Footprint) -> list[tuple[str, int]]:
    """Name and bytes of each part of the total; the larger of backward and optimizer step counts."""
    backward = found.gradients_in_flight + found.saved_layers + found.saved_rest + found.workspace
    return [
        ("weights", found.state.weights),
        ("gradients", found.state.gradients),
        ("fp32 masters", found.state.masters),
        ("Adam moments", found.state.moments),
        ("in host memory (offload)", -found.host_state),
        ("communication buckets", found.buckets),
        ("gathered weights (ZeRO 3)", found.gathered_weights),
        ("gradients of the current layer", found.gradients_in_flight),
        ("activations of the layers", found.saved_layers),
        ("embedding, final norm, loss, rotary tables", found.saved_rest),
        ("working memory of a layer or the loss (estimate)", found.workspace),
        ("optimizer step, in excess of the backward", max(0, found.step_copy - backward)),
        ("fragmentation margin (estimate)", found.margin),
        ("device context and libraries (estimate)", found.libraries),
    ]


def memory_json(found: Footprint) -> dict[str, Any]:
    return {
        "total_bytes": found.total,
        "weights": found.state.weights,
        "gradients": found.state.gradients,
        "masters": found.state.masters,
        "moments": found.state.moments,
        "model_state_bytes": found.state.total,
        **{name: value for name, value in vars(found).items() if name not in ("state", "layer_activations")},
        "activations_per_layer": found.layer_activations,
    }


def show_memory(run: RunConfig, world_size: int, found: Footprint, gpu: Gpu | None) -> None:
    fits = (
        "" if gpu is None else f"; {'fits' if found.total <= gpu.memory_bytes else 'does not fit'} {gpu.name}"
    )
    conclusion = f"{format_bytes(found.total)} per rank on {world_size:,} ranks{fits}."
    lines = [(name, format_bytes(count), f"{count:,}") for name, count in memory_lines(found) if count > 0]
    lines += [
        (name, f"-{format_bytes(-count)}", f"{count:,}") for name, count in memory_lines(found) if count < 0
    ]
    layers = [
        (f"{policy}{' *' if policy == run.model.recompute else ''}", format_bytes(count), f"{count:,}")
        for policy, count in found.layer_activations.items()
    ]
    note = "Model state and activations are exact; the estimates are not confirmed on a GPU."
    show(
        [
            conclusion,
            Grid("Memory per rank", ("", "", "bytes"), lines),
            Grid("Activations of one layer, by recompute", ("", "", "bytes"), layers),
            note,
        ]
    )


# --- layout

_NOT_HERE = {"h100": ", none on an H100 (docs/planner.md)"}

LAYOUT_COLUMNS = (
    "tp", "dp", "ZeRO", "micro", "batch", "recompute", "tokens/s per GPU", "MFU causal", "MFU full",
    "HFU causal", "days", "GiB",
)  # fmt: skip


def layout_json(option: Option) -> dict[str, Any]:
    return {
        "layout": option.layout,
        "global_batch_size": option.run.train.global_batch_size,
        "tokens_per_s_per_gpu": option.tokens_per_s_per_gpu,
        "step_s": option.step.total,
        "step_breakdown_s": vars(option.step),
        "mfu_causal": option.mfu_causal,
        "mfu_full": option.mfu_full,
        "hfu_causal": option.hfu_causal,
        "days": option.days,
        "gpu_hours": option.gpu_hours,
        "memory_bytes": option.footprint.total,
    }


def found_json(found: Found, cluster: Cluster, top: int) -> dict[str, Any]:
    best = found.options[0]
    return {
        **layout_json(best),
        "gpu": cluster.gpu.name,
        "gpus": cluster.gpus,
        "network": cluster.network.name,
        "peak_flops": cluster.gpu.peak.bf16_flops,
        "peak_source": cluster.gpu.peak.source,
        "tokens": best.run.train.steps * best.run.tokens_per_step,
        "steps": best.run.train.steps,
        "options": [layout_json(option) for option in found.options[:top]],
        "rejected": [{"reason": reason, "layouts": count} for reason, count in found.rejected.items()],
    }


def conclude(best: Option, name: str) -> str:
    cluster, layout = best.cluster, best.layout
    tokens = format_count(best.run.train.steps * best.run.tokens_per_step)
    return (
        f"{name} on {cluster.gpus:,} x {cluster.gpu.name}: tp {layout['tp']} x dp {layout['dp']:,}, ZeRO "
        f"{layout['zero_stage']}, micro-batch {layout['micro_batch_size']}, recompute {layout['recompute']}: "
        f"{best.tokens_per_s_per_gpu:,.0f} tokens/s/GPU, {tokens} tokens in {best.days:,.1f} days, "
        f"{best.gpu_hours:,.0f} GPU-hours."
    )


def show_layouts(name: str, found: Found, cluster: Cluster, top: int) -> None:
    best = found.options[0]
    rows = [layout_row(option) for option in found.options[:top]]
    total = best.step.total
    parts = [
        (part.replace("_", " "), f"{s:.3f}", f"{s / total:.1%}") for part, s in vars(best.step).items() if s
    ]
    rejected = [(reason, f"{count}") for reason, count in found.rejected.items()]
    batch = best.run.train.global_batch_size
    notes = (
        f"Batch of the first: {batch:,} sequences of {best.run.model.seq_length:,} tokens, "
        f"{best.run.train.steps:,} steps; network {cluster.network.name}: "
        f"{cluster.network.bytes_per_gpu / 1e9:.1f} GB/s a GPU.\n"
        f"{_mfu_note(best)}"
    )
    longest = max(row.shape.model.seq_length for row in PUBLISHED)
    if best.run.model.seq_length > longest:
        notes += f"\nNone of the published runs (plan validate) has more than {longest:,} tokens a sequence."
    if cluster.efficiency == constants_of(cluster.gpu) != Efficiency():
        notes += f"\nConstants measured on one H200{_NOT_HERE.get(cluster.gpu.name, '')}."
    tables: list[str | Grid] = [
        Grid(f"Fastest of {len(found.options)} layouts that are valid and fit", LAYOUT_COLUMNS, rows),
        Grid("One step of the first", ("", "seconds", "share"), parts),
    ]
    if rejected:
        tables.append(Grid("Ruled out", ("", "layouts"), rejected))
    show([conclude(best, name), *tables, notes])


def layout_row(option: Option) -> list[str]:
    layout = option.layout
    return [
        *(f"{layout[key]}" for key in ("tp", "dp", "zero_stage", "micro_batch_size")),
        f"{option.run.train.global_batch_size}",
        f"{layout['recompute']}",
        f"{option.tokens_per_s_per_gpu:,.0f}",
        f"{option.mfu_causal:.1%}",
        f"{option.mfu_full:.1%}",
        f"{option.hfu_causal:.1%}",
        f"{option.days:,.1f}",
        f"{option.footprint.total / GIB:.1f}",
    ]


def _mfu_note(option: Option) -> str:
    flops, peak = token_flops(option.run.model), option.cluster.gpu.peak
    return (
        f"MFU = tokens/s * flops per token / peak; causal: 6 Nmm + 6 L n d s = {flops.causal / 1e9:.2f} G, "
        f"full: 6 Nmm + 12 L n d s = {flops.full / 1e9:.2f} G;\nHFU: operations executed, causal; "
        f"peak {peak.bf16_flops / 1e12:g} TFLOP/s ({peak.source})."
    )


# --- validation


def conclude_validation(rows: Sequence[Row]) -> str:
    held_out = [row for row in rows if not row.fitted]
    median, largest = median_error(rows), largest_error(rows)
    verdict = "is met" if median <= MEDIAN_BAR and largest <= LARGEST_BAR else "is missed"
    return (
        f"{len(rows)} published runs: median error {median:.1%}, largest {largest:.1%}; "
        f"{len(held_out)} of them held out from the fit: {median_error(held_out):.1%}, "
        f"{largest_error(held_out):.1%}. The bar of {MEDIAN_BAR:.0%} and {LARGEST_BAR:.0%} {verdict}."
    )


def validation_json(rows: Sequence[Row], own: Sequence[Row]) -> dict[str, Any]:
    held_out = [row for row in rows if not row.fitted]
    return {
        "median_error": median_error(rows),
        "largest_error": largest_error(rows),
        "held_out_median_error": median_error(held_out),
        "held_out_largest_error": largest_error(held_out),
        "rows": [vars(row) | {"error": row.error} for row in rows],
        "measured": [vars(row) | {"error": row.error} for row in own],
    }


def validation_markdown(rows: Sequence[Row]) -> str:
    """Table of published runs for docs/planner.md."""
    head = ["| run | predicted | published | error | constants | source |", "|---|---:|---:|---:|---|---|"]
    body = [
        f"| {row.name} | {row.predicted:,.0f} | {row.published:,.0f} | {row.error:+.1%} | "
        f"{'fitted on it' if row.fitted else 'held out'} | {row.source} |"
        for row in rows
    ]
    return "\n".join([*head, *body])


def measured_markdown(own: Sequence[Row]) -> str:
    """Table of our own measured steps for docs/planner.md."""
    head = ["| step | predicted | measured | error |", "|---|---:|---:|---:|"]
    body = [f"| {row.name} | {row.predicted:,.0f} | {row.published:,.0f} | {row.error:+.1%} |" for row in own]
    return "\n".join([*head, *body])


def show_validation(rows: Sequence[Row], own: Sequence[Row]) -> None:
    columns = ("tokens/s/GPU", "predicted", "published", "error", "fitted")
    lines = [(*_speeds(row), "yes" if row.fitted else "") for row in rows]
    measured = Grid(
        f"Our own steps on {own[0].source}, by the constants of that GPU",
        ("tokens/s/GPU", "predicted", "measured", "error"),
        [_speeds(row) for row in own],
    )
    show([conclude_validation(rows), Grid("Predicted against published", columns, lines), measured])


def _speeds(row: Row) -> tuple[str, str, str, str]:
    return row.name, f"{row.predicted:,.0f}", f"{row.published:,.0f}", f"{row.error:+.1%}"
