"""How to train what `plan size` recommends: the fastest layout on the GPUs asked for. Imports no torch."""

from dataclasses import dataclass
from typing import Any

from llama_mcore.plan.layout.efficiency import Efficiency
from llama_mcore.plan.layout.report import LAYOUT_COLUMNS, layout_row
from llama_mcore.plan.layout.search import Cluster, Found, Goal, search
from llama_mcore.plan.layout.to_run import base_run
from llama_mcore.plan.layout.validation import largest_error, validate
from llama_mcore.plan.size.solve import Request, SizePlan, at_mfu, plan_size
from llama_mcore.plan.table import Grid

BATCH_TOKENS = 4 * 2**20
"""Of a step, as in the LLaMA paper; `plan layout` takes others."""
NOTED_DIFFERENCE = 0.05
"""Of the predicted days from those at the MFU that was given."""
NEAR_MFU = 0.02
"""Relative difference between the MFU of a plan and that of its layout at which they are one."""
MOST_ROUNDS = 4


@dataclass(frozen=True)
class LayoutForSize:
    plan: SizePlan
    found: Found

    @property
    def mfu(self) -> float | None:
        """Of the fastest layout, 6 N operations a token; None where there is none."""
        if not self.found.options:
            return None
        speed = self.found.options[0].tokens_per_s_per_gpu
        return speed * 6 * self.plan.shape.params / self.plan.request.gpu.peak.bf16_flops


def plan_with_layout(asked: Request) -> tuple[SizePlan, LayoutForSize | None]:
    """What to train, and how on the GPUs asked for. What they reach decides the size where no MFU was given:
    the size, its layout and the MFU of that are found in turns. Raises ConfigError."""
    plan = plan_size(asked)
    how = how_to_train(plan)
    for _ in range(MOST_ROUNDS):
        reached = how.mfu if how else None
        if asked.mfu_is_given or not reached or abs(reached / plan.request.mfu - 1) <= NEAR_MFU:
            break
        plan = plan_size(at_mfu(asked, reached))
        how = how_to_train(plan)
    return plan, how


def how_to_train(plan: SizePlan) -> LayoutForSize | None:
    """None where no number of GPUs was asked for."""
    asked = plan.request
    if not asked.gpus:
        return None
    between = asked.gpu.network
    cluster = Cluster(asked.gpu, asked.gpus, between, Efficiency())
    run = base_run(plan.shape.preset) if plan.shape.preset else base_run(shape=plan.shape.fields)
    goal = Goal(run, plan.recommended.allocation.tokens, BATCH_TOKENS / run.model.seq_length)
    return LayoutForSize(plan, search(goal, cluster))


def how_dict(how: LayoutForSize | None) -> dict[str, Any] | None:
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


def how_parts(how: LayoutForSize) -> list[str | Grid]:
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
    parts: list[str | Grid] = [Grid(title, LAYOUT_COLUMNS, [layout_row(best)]), _days(how)]
    if best.run.train.global_batch_size < best.cluster.gpus:
        parts.append(
            "So many GPUs have less than a sequence of a step each, and mostly communicate: a larger batch "
            "is faster (plan layout --global-batch-tokens 16M)."
        )
    return parts


def _days(how: LayoutForSize) -> str:
    """The prediction against the days at the MFU of the plan."""
    plan, predicted = how.plan, how.found.options[0].days
    given, mfu = plan.days, plan.request.mfu
    doubt = (
        "The prediction knows no restarts and no slow nodes, and was off by up to "
        f"{largest_error(validate(Efficiency())):.0%} (plan validate): keep some days for both."
    )
    if abs(predicted - given) <= NOTED_DIFFERENCE * given:
        if not plan.request.mfu_is_given:
            return f"The size follows from what this layout is predicted to reach. {doubt}"
        return f"The prediction agrees with --mfu {mfu:g}: {predicted:.1f} days for {given:.1f}. {doubt}"
    return (
        f"This layout is predicted to take {predicted:.1f} days, not {given:.1f}: it reaches an MFU of "
        f"{how.mfu:.2f} in the count of --mfu, not {mfu:.2f}. With --mfu {how.mfu:.2f} the answer is "
        f"{'a larger' if predicted < given else 'a smaller'} run in the same days. {doubt}"
    )
