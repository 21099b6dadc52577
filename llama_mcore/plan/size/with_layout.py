"""The fastest layout for the model that `plan size` recommends, on the requested GPUs. Imports no torch."""

from dataclasses import dataclass
from typing import Any

from llama_mcore.plan.layout.calibration import constants_of
from llama_mcore.plan.layout.efficiency import Efficiency
from llama_mcore.plan.layout.report import LAYOUT_COLUMNS, layout_row
from llama_mcore.plan.layout.search import Cluster, Found, Goal, search
from llama_mcore.plan.layout.to_run import base_run
from llama_mcore.plan.layout.validation import largest_error, validate
from llama_mcore.plan.size.solve import Request, SizePlan, plan_size, with_mfu
from llama_mcore.plan.table import Grid

BATCH_TOKENS = 4 * 2**20
"""Tokens per step, as in the LLaMA paper; `plan layout` takes others."""
NOTED_DIFFERENCE = 0.05
"""Relative difference of the predicted days from those at the given MFU that is worth a note."""
NEAR_MFU = 0.02
"""Relative difference between the MFUs of a plan and of its layout at which they count as equal."""
MOST_ROUNDS = 4


@dataclass(frozen=True)
class LayoutForSize:
    """A plan and the layouts found for it."""

    plan: SizePlan
    found: Found

    @property
    def mfu(self) -> float | None:
        """MFU of the fastest layout at 6 N operations a token; None if no layout fits."""
        if not self.found.options:
            return None
        speed = self.found.options[0].tokens_per_s_per_gpu
        return speed * 6 * self.plan.shape.params / self.plan.request.gpu.peak.bf16_flops


def plan_with_layout(request: Request) -> tuple[SizePlan, LayoutForSize | None]:
    """The model to train, and its fastest layout if a number of GPUs was given. Raises ConfigError.

    Without a given MFU the size depends on what the layout reaches: size, layout and its MFU are found in
    turns.
    """
    plan = plan_size(request)
    layout = _fastest_layout(plan)
    for _ in range(MOST_ROUNDS):
        reached = layout.mfu if layout else None
        if request.mfu_is_given or not reached or abs(reached / plan.request.mfu - 1) <= NEAR_MFU:
            break
        plan = plan_size(with_mfu(request, reached))
        layout = _fastest_layout(plan)
    return plan, layout


def _fastest_layout(plan: SizePlan) -> LayoutForSize | None:
    """Layouts for a plan, fastest first; None without a number of GPUs."""
    request = plan.request
    if not request.gpus:
        return None
    between = request.gpu.network
    cluster = Cluster(request.gpu, request.gpus, between, constants_of(request.gpu))
    run = base_run(plan.shape.preset) if plan.shape.preset else base_run(shape=plan.shape.fields)
    goal = Goal(run, plan.recommended.allocation.tokens, BATCH_TOKENS / run.model.seq_length)
    return LayoutForSize(plan, search(goal, cluster))


def layout_dict(layout: LayoutForSize | None) -> dict[str, Any] | None:
    """Key `layout` of `plan size --json`; null without GPUs, and if no layout fits."""
    if not layout or not layout.found.options:
        return None
    best = layout.found.options[0]
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


def layout_parts(layout: LayoutForSize) -> list[str | Grid]:
    """The section "How to train it", without the command at its end."""
    request = layout.plan.request
    if not layout.found.options:
        return [
            f"How to train it: on {request.gpus:,} {request.gpu.name} no layout is valid and fits. The "
            "command below gives the reasons and the smallest change."
        ]
    best = layout.found.options[0]
    title = (
        f"How to train it: the fastest of {len(layout.found.options)} layouts, predicted, "
        f"{best.run.train.global_batch_size:,} sequences a step, network {best.cluster.network.name}"
    )
    parts: list[str | Grid] = [Grid(title, LAYOUT_COLUMNS, [layout_row(best)]), _days(layout)]
    if best.run.train.global_batch_size < best.cluster.gpus:
        parts.append(
            "With less than one sequence a step for each GPU, they mostly communicate: a larger batch is "
            "faster (plan layout --global-batch-tokens 16M)."
        )
    return parts


def _days(layout: LayoutForSize) -> str:
    """The predicted days compared with those at the plan's MFU."""
    plan, predicted = layout.plan, layout.found.options[0].days
    given, mfu = plan.days, plan.request.mfu
    doubt = (
        "The prediction ignores restarts and slow nodes, and was off by up to "
        f"{largest_error(validate(Efficiency())):.0%} (plan validate): allow some days for both."
    )
    if abs(predicted - given) <= NOTED_DIFFERENCE * given:
        if not plan.request.mfu_is_given:
            return f"The size follows from the predicted speed of this layout. {doubt}"
        return f"The prediction agrees with --mfu {mfu:g}: {predicted:.1f} days for {given:.1f}. {doubt}"
    return (
        f"This layout is predicted to take {predicted:.1f} days, not {given:.1f}: it reaches an MFU of "
        f"{layout.mfu:.2f} in the count of --mfu, not {mfu:.2f}. With --mfu {layout.mfu:.2f} the answer is "
        f"{'a larger' if predicted < given else 'a smaller'} run in the same days. {doubt}"
    )
