"""How to train what `plan size` recommends: the fastest layout on the GPUs asked for. Pure Python."""

from dataclasses import dataclass
from typing import Any

from llama_mcore.plan.efficiency import Efficiency
from llama_mcore.plan.hardware import DEFAULT_NETWORK, network
from llama_mcore.plan.layout_report import LAYOUT_COLUMNS, layout_row
from llama_mcore.plan.layout_run import base_run
from llama_mcore.plan.search import Cluster, Found, search, with_tokens
from llama_mcore.plan.size import SizePlan
from llama_mcore.plan.table import Grid

BATCH_TOKENS = 4 * 2**20
"""Of a step, as in the LLaMA paper; `plan layout` takes others."""
NOTED_DIFFERENCE = 0.05
"""Of the predicted days from those at the MFU that was given."""


@dataclass(frozen=True)
class How:
    plan: SizePlan
    found: Found


def how_to_train(plan: SizePlan) -> How | None:
    """None where no number of GPUs was asked for."""
    asked = plan.request
    if not asked.gpus:
        return None
    between = network(DEFAULT_NETWORK[asked.gpu.name])
    cluster = Cluster(asked.gpu, asked.gpus, between, Efficiency())
    run = base_run(plan.shape.preset) if plan.shape.preset else base_run(shape=plan.shape.fields)
    tokens = plan.recommended.allocation.tokens
    return How(plan, search(with_tokens(run, tokens, BATCH_TOKENS, cluster), cluster))


def how_dict(how: How | None) -> dict[str, Any] | None:
    """The key `layout` of `plan size --json`; null without GPUs, and where nothing runs and fits."""
    if not how or not how.found.options:
        return None
    best = how.found.options[0]
    return {
        **best.layout,
        "tokens_per_s_per_gpu": best.tokens_per_s_per_gpu,
        "mfu_causal": best.mfu_causal,
        "mfu_full": best.mfu_full,
        "hfu_causal": best.hfu_causal,
        "days": best.days,
        "gpu_hours": best.gpu_hours,
        "memory_bytes": best.footprint.total,
        "global_batch_size": best.run.train.global_batch_size,
        "network": best.cluster.network.name,
    }


def how_parts(how: How) -> list[str | Grid]:
    """The section "How to train it", without the command to go on."""
    asked = how.plan.request
    if not how.found.options:
        return [
            f"How to train it: on {asked.gpus:,} {asked.gpu.name} no layout runs and fits. The command below "
            "says why, and what the smallest change is."
        ]
    best = how.found.options[0]
    title = (
        f"How to train it: the fastest of {len(how.found.options)} layouts, predicted, "
        f"{best.run.train.global_batch_size:,} sequences a step, network {best.cluster.network.name}"
    )
    return [Grid(title, LAYOUT_COLUMNS, [layout_row(best)]), _days(how)]


def _days(how: How) -> str:
    """The prediction against the days at the MFU that was given."""
    plan, best = how.plan, how.found.options[0]
    predicted, given = best.days, plan.days
    mfu = best.tokens_per_s_per_gpu * 6 * plan.shape.params / plan.request.gpu.peak.bf16_flops
    if abs(predicted - given) <= NOTED_DIFFERENCE * given:
        return f"The prediction agrees with --mfu {plan.request.mfu:g}: {predicted:.1f} days for {given:.1f}."
    less = predicted < given
    return (
        f"This layout is predicted to take {predicted:.1f} days, not the {given:.1f} of --mfu "
        f"{plan.request.mfu:g}: it reaches {mfu:.2f} in the same count. With --mfu {mfu:.2f} the answer is "
        f"{'a larger run' if less else 'a smaller run'} in the same days. The prediction knows no restarts "
        "and no slow nodes, and was off by up to 17 % (plan validate): keep some days for both."
    )
