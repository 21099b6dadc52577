"""Output of `plan size`, as text and as JSON. Imports no torch."""

import shlex
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, get_args

from llama_mcore.model.config import Recompute
from llama_mcore.plan.data import PAPER_TOKENS, WORTHWHILE_EPOCHS
from llama_mcore.plan.size.energy import CO2_T_PER_MWH, PAPER_65B_TOKENS_PER_S, PAPER_GPU_WATTS, PUE
from llama_mcore.plan.size.scaling import LAWS, ROUNDING, Allocation, ParametricLaw, kaplan_loss
from llama_mcore.plan.size.solve import Costed, PaperModel, SizePlan
from llama_mcore.plan.size.with_layout import LayoutForSize, layout_dict, layout_parts
from llama_mcore.plan.table import Grid, flops, whole
from llama_mcore.units import format_count

_USUAL_TOKENS_PER_PARAM = 100


def size_dict(plan: SizePlan, layout: LayoutForSize | None = None) -> dict[str, Any]:
    """JSON of `plan size`, with the keys that docs/planner.md describes."""
    request = plan.request
    return {
        "conclusion": conclusion(plan),
        "law": {"name": request.law_name, **asdict(request.law)},
        "budget_flops": request.flops,
        "target_loss": request.loss,
        "inference_tokens": request.inference_tokens,
        "gpu": request.gpu.name,
        "gpu_peak_flops": request.gpu.peak.bf16_flops,
        "gpus": plan.gpus,
        "days": plan.days,
        "mfu": request.mfu,
        "mfu_causal": plan.mfu_causal,
        "mfu_full": plan.mfu_full,
        "hfu": {
            policy: dict(zip(("causal", "full"), plan.hfu(policy), strict=True))
            for policy in get_args(Recompute)
        },
        "tokens_per_s_per_gpu": plan.tokens_per_s_per_gpu,
        "recommended": {"preset": plan.shape.preset, "shape": _shape(plan), **_costed(plan.recommended)},
        "optimum": _costed(plan.optimum),
        "compute_optimal_same_loss": _costed(plan.compute_optimal_same_loss),
        "compute_optimal_same_budget": _costed(plan.compute_optimal_same_budget),
        "lifetime_saving": plan.saving,
        "budget_binds": plan.budget_binds,
        "laws": {name: _allocation(found) for name, found in plan.law_optima.items()},
        "llama": {model.name: _paper_model(model) for model in plan.paper},
        "data": plan.data.to_dict(),
        "notes": notes(plan),
        "layout": layout_dict(layout),
        "next_command": shlex.join(plan.layout_command),
    }


def size_parts(plan: SizePlan, layout: LayoutForSize | None = None) -> list[str | Grid]:
    """Paragraphs and tables that `plan size` prints."""
    return [
        conclusion(plan),
        _candidates(plan),
        _laws(plan),
        _paper(plan.paper, plan.request.inference_tokens),
        "\n".join(f"- {note}" for note in notes(plan)),
        *(layout_parts(layout) if layout else []),
        f"{'Other layouts' if layout else 'How to train it'}:\n    {shlex.join(plan.layout_command)}",
    ]


def conclusion(plan: SizePlan) -> str:
    """The recommendation in one line."""
    found = plan.recommended
    model = plan.shape.preset or f"{format_count(plan.shape.params)} parameters ({plan.shape.describe()})"
    text = (
        f"Train {model} on {format_count(found.allocation.tokens)} tokens: loss {found.loss:.3f} expected, "
        f"{plan.days:.1f} days on {plan.gpus:,} {plan.request.gpu.name} at an MFU of {plan.mfu_causal:.1%} "
        f"(causal attention; full: {plan.mfu_full:.1%})"
    )
    if not plan.request.inference_tokens:
        return text + "."
    served = format_count(plan.request.inference_tokens)
    return (
        f"{text}; with {served} tokens of inference it costs {plan.saving:.0%} less over its lifetime than "
        "the compute-optimal model of the same loss."
    )


def notes(plan: SizePlan) -> list[str]:
    """Assumptions behind the figures, and doubts about them."""
    request = plan.request
    found = [
        f"law: {request.law.title}. Its loss is in nats of Chinchilla's own data and tokenizer: it compares "
        "sizes, and is not the loss that a LLaMA's curve shows. Fitted on 70M to 16B parameters and 5B to "
        "500B tokens; "
        "beyond that it extrapolates.",
        ROUNDING,
        f"MFU {request.mfu:.3g}{_where_from(plan)} counts 6 N operations a token, as the laws do; for this "
        f"shape at {plan.shape.model.seq_length:,} tokens it is {plan.mfu_causal:.3g} with causal and "
        f"{plan.mfu_full:.3g} with full attention counted (HFU {_hfu(plan, 'selective')} with our backward, "
        f"{_hfu(plan, 'full')} with full recompute), {plan.tokens_per_s_per_gpu:,.0f} tokens/s/GPU. "
        f"Peak: {request.gpu.peak.source}. Inference is counted at the same MFU; serving often reaches less.",
        f"energy: GPU-hours x {request.gpu.watts:g} W x PUE {PUE:g}; CO2: {CO2_T_PER_MWH:g} t a MWh "
        f"(LLaMA paper, section 6, with {PAPER_GPU_WATTS:g} W for its A100).",
        *_data_notes(plan),
    ]
    ratio = plan.recommended.allocation.tokens_per_param
    if ratio > _USUAL_TOKENS_PER_PARAM:
        found.append(
            f"{ratio:.0f} tokens per parameter are beyond the range in which the law was fitted; such fits "
            "overrate the benefit of further tokens there (Sardana et al. 2401.00448)."
        )
    if plan.budget_binds:
        found.append(
            "The budget binds: a smaller model trained longer would cost less over its lifetime at this loss."
        )
    return found


def _where_from(plan: SizePlan) -> str:
    if plan.request.mfu_is_given or not plan.request.gpus:
        return "" if plan.request.mfu_is_given else ", the default,"
    return ", predicted for the layout below,"


def _hfu(plan: SizePlan, recompute: Recompute) -> str:
    causal, full = plan.hfu(recompute)
    return f"{causal:.3g} and {full:.3g}"


def _data_notes(plan: SizePlan) -> list[str]:
    tokens, data = plan.data.tokens, plan.data
    if tokens <= PAPER_TOKENS:
        return []
    most = max(data.sources, key=lambda source: source.epochs)
    note = (
        f"data: {format_count(tokens)} tokens are more than the {format_count(PAPER_TOKENS)} of the paper's "
        f"Table 1; its mixture would be read {tokens / PAPER_TOKENS:.2f} times as often, "
        f"{most.name} {most.epochs:.1f} times."
    )
    if tokens > data.tokens_within_limit:
        note += (
            f" Beyond {format_count(data.tokens_within_limit)} tokens a source repeats more than "
            f"{WORTHWHILE_EPOCHS:g} times, which loses its value (Muennighoff et al. 2305.16264): "
            "find more text, or train a larger model on less."
        )
    return [note]


def _candidates(plan: SizePlan) -> Grid:
    columns = {
        "nearest shape": plan.recommended,
        "optimum": plan.optimum,
        "compute-optimal, same loss": plan.compute_optimal_same_loss,
        "compute-optimal, same FLOPs": plan.compute_optimal_same_budget,
    }
    lines: list[tuple[str, Callable[[Costed], str]]] = [
        *_MODEL_LINES,
        *_COST_LINES,
        ("training CO2 (t)", lambda c: whole(c.training_co2_t)),
        *_LIFETIME_LINES,
        ("lifetime energy (MWh)", lambda c: whole(c.lifetime_mwh)),
        ("lifetime CO2 (t)", lambda c: whole(c.lifetime_co2_t)),
    ]
    served = _served(plan.request.inference_tokens)
    rows = [[name, *(show(costed) for costed in columns.values())] for name, show in lines]
    return Grid(f"The best model, with {served}", ["", *columns], rows)


def _laws(plan: SizePlan) -> Grid:
    budget = plan.compute_optimal_same_budget.training_flops
    rows = [
        [
            LAWS[name].title,
            format_count(found.params),
            format_count(found.tokens),
            f"{found.tokens_per_param:.3g}",
            _own_loss(name, found),
        ]
        for name, found in plan.law_optima.items()
    ]
    headers = ["law", "parameters", "tokens", "tokens/parameter", "loss by itself"]
    return Grid(f"Compute-optimal for {flops(budget)} FLOPs of training", headers, rows)


def _own_loss(name: str, found: Allocation) -> str:
    law = LAWS[name]
    if isinstance(law, ParametricLaw):
        return f"{law.loss(found.params, found.tokens):.3f}"
    return f"{kaplan_loss(found.params, found.tokens):.3f}" if name == "kaplan" else "-"


def _paper(models: list[PaperModel], inference_tokens: float) -> Grid:
    shown: list[tuple[str, Callable[[PaperModel], str]]] = [
        *((name, _of_costed(show)) for name, show in (*_MODEL_LINES, *_COST_LINES)),
        ("training CO2 (t)", lambda model: whole(model.costed.training_co2_t)),
        ("tokens/s/GPU of its GPU-hours", lambda model: f"{model.tokens_per_s_per_gpu:,.0f}"),
        *((name, _of_costed(show)) for name, show in _LIFETIME_LINES),
        ("cost above the cheapest of its loss", lambda model: f"{model.over_cheapest:.1%}"),
        ("cheapest of its loss for inference of", lambda model: _best_for(model.best_for_inference_tokens)),
    ]
    rows = [[name, *(show(model) for model in models)] for name, show in shown]
    title = (
        f"LLaMA as the paper trained it (GPU-hours: Table 15, A100; 65B: {PAPER_65B_TOKENS_PER_S:g} "
        f"tokens/s/GPU), with {_served(inference_tokens)}"
    )
    return Grid(title, ["", *(model.name for model in models)], rows)


def _served(inference_tokens: float) -> str:
    return f"{format_count(inference_tokens)} tokens of inference" if inference_tokens else "no inference"


def _best_for(inference_tokens: float) -> str:
    """Amount of inference as text; a model larger than compute-optimal is the cheapest for none."""
    return format_count(inference_tokens) if inference_tokens >= 0 else "none"


def _of_costed(show: Callable[[Costed], str]) -> Callable[[PaperModel], str]:
    return lambda model: show(model.costed)


_MODEL_LINES: list[tuple[str, Callable[[Costed], str]]] = [
    ("parameters", lambda c: format_count(c.allocation.params)),
    ("tokens", lambda c: format_count(c.allocation.tokens)),
    ("tokens/parameter", lambda c: f"{c.allocation.tokens_per_param:.1f}"),
    ("loss (nats/token)", lambda c: f"{c.loss:.3f}"),
]
_COST_LINES: list[tuple[str, Callable[[Costed], str]]] = [
    ("training FLOPs", lambda c: flops(c.training_flops)),
    ("training GPU-hours", lambda c: whole(c.training_gpu_hours)),
    ("training energy (MWh)", lambda c: whole(c.training_mwh)),
]
_LIFETIME_LINES: list[tuple[str, Callable[[Costed], str]]] = [
    ("lifetime FLOPs", lambda c: flops(c.lifetime_flops)),
    ("lifetime GPU-hours", lambda c: whole(c.lifetime_gpu_hours)),
]


def _allocation(found: Allocation) -> dict[str, float]:
    return {
        "params": found.params,
        "tokens": found.tokens,
        "tokens_per_param": found.tokens_per_param,
    }


def _costed(found: Costed) -> dict[str, Any]:
    row = asdict(found)
    return _allocation(found.allocation) | {key: value for key, value in row.items() if key != "allocation"}


def _paper_model(model: PaperModel) -> dict[str, Any]:
    return {
        **_costed(model.costed),
        "tokens_per_s_per_gpu": model.tokens_per_s_per_gpu,
        "best_for_inference_tokens": model.best_for_inference_tokens,
        "over_cheapest": model.over_cheapest,
    }


def _shape(plan: SizePlan) -> dict[str, int]:
    fields = (
        "num_layers",
        "hidden_size",
        "num_attention_heads",
        "ffn_hidden_size",
        "vocab_size",
        "seq_length",
    )
    return {name: getattr(plan.shape.model, name) for name in fields}
