"""The picture of `plan size`: loss against lifetime cost, and models of equal loss.

matplotlib is imported when it draws.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from llama_mcore.errors import OutputError, Problem
from llama_mcore.picture import save_figure
from llama_mcore.plan.size.scaling import Allocation
from llama_mcore.plan.size.solve import SizePlan
from llama_mcore.units import format_count

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LINE_COLOR, OPTIMUM_COLOR, PAPER_COLOR, FRONTIER_COLOR = "#8a8a8a", "#c8501e", "#1f4e79", "#2e7d4f"
_POINTS = 120
_ISO_STEPS = (-0.10, -0.05, 0.0, 0.05, 0.10)  # nats around the loss of the optimum


def draw_size(plan: SizePlan, output: Path) -> None:
    """Write a PNG, completely or not at all. Raises OutputError if it exists or cannot be written."""
    if output.exists():
        raise OutputError(
            Problem("--picture", output, "already exists", "move it away or choose another name")
        )
    save_figure(_figure(plan), output)


def _figure(plan: SizePlan) -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 6), dpi=120, layout="constrained")
    cost_axes, iso_axes = figure.subplots(1, 2)
    _draw_cost(cost_axes, plan)
    _draw_iso_loss(iso_axes, plan)
    found, served = plan.optimum.allocation, plan.request.inference_tokens
    figure.suptitle(
        f"Optimum: {format_count(found.params)} parameters on {format_count(found.tokens)} tokens, "
        f"{f'for {format_count(served)} tokens of' if served else 'without'} inference; "
        f"law: {plan.request.law_name}",
        fontweight="bold",
    )
    return figure


def _draw_cost(axes: "Axes", plan: SizePlan) -> None:
    """Loss against cost: a line for each size, trained ever longer; the lower edge is cheapest."""
    law, served = plan.request.law, plan.request.inference_tokens
    centre, flops = plan.optimum.allocation, plan.optimum.training_flops
    for factor in (0.1, 0.3, 1.0, 3.0, 10.0):
        params = centre.params * factor
        models = [Allocation(params, tokens) for tokens in _around(flops / (6 * params), 1.5)]
        costs = [model.lifetime_flops(served) for model in models]
        losses = [law.loss(model.params, model.tokens) for model in models]
        axes.plot(costs, losses, color=LINE_COLOR, linewidth=1)
        # The lines of small models part at their right ends, those of large ones at their left ends.
        end, side = (-1, "left") if factor < 1 else (0, "right")
        _label(axes, format_count(params), (costs[end], losses[end]), side)
    best = [law.cheapest_of_budget(budget, served) for budget in _around(flops, 2.0)]
    axes.plot(
        [model.lifetime_flops(served) for model in best],
        [law.loss(model.params, model.tokens) for model in best],
        color=FRONTIER_COLOR,
        linewidth=2,
        label="cheapest for each loss",
    )
    points = [(model.name, model.costed.lifetime_flops, model.costed.loss) for model in plan.paper]
    _mark(axes, points, (plan.optimum.lifetime_flops, plan.optimum.loss))
    axes.set_xscale("log")
    axes.set_xlabel("lifetime FLOPs (training and inference)")
    axes.set_ylabel("expected loss (nats/token)")
    axes.set_title("Loss against lifetime cost; grey: one size each", loc="left")
    axes.legend(frameon=False)


def _draw_iso_loss(axes: "Axes", plan: SizePlan) -> None:
    law, centre = plan.request.law, plan.optimum.allocation
    sizes = _around(centre.params, 1.5)
    for step in _ISO_STEPS:
        loss = plan.optimum.loss + step
        line = [(n, tokens) for n in sizes if (tokens := law.tokens_for(loss, n)) is not None]
        line = [(n, tokens) for n, tokens in line if tokens < 100 * centre.tokens]
        if line:
            axes.plot(*zip(*line, strict=True), color=LINE_COLOR, linewidth=1)
            _label(axes, f"{loss:.2f}", line[-1], "left")
    budget = plan.compute_optimal_same_budget.training_flops
    name = "training budget" if plan.request.flops else "training FLOPs of the optimum"
    axes.plot(sizes, [budget / (6 * n) for n in sizes], "--", color=FRONTIER_COLOR, label=name)
    same = plan.compute_optimal_same_loss.allocation
    axes.plot([same.params], [same.tokens], "s", color=FRONTIER_COLOR, label="compute-optimal, same loss")
    points = [
        (model.name, model.costed.allocation.params, model.costed.allocation.tokens) for model in plan.paper
    ]
    _mark(axes, points, (centre.params, centre.tokens))
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("parameters")
    axes.set_ylabel("training tokens")
    axes.set_title("Models of equal loss", loc="left")
    axes.legend(frameon=False)


def _label(axes: "Axes", text: str, at: tuple[float, float], side: str) -> None:
    """Write `text` at the end of a line, which is at this `side` of the text."""
    axes.annotate(
        text,
        at,
        xytext=(4 if side == "left" else -4, 0),
        textcoords="offset points",
        fontsize=8,
        color=LINE_COLOR,
        ha=side,
        va="center",
    )


def _mark(axes: "Axes", points: list[tuple[str, float, float]], optimum: tuple[float, float]) -> None:
    """Draw the paper's models and the optimum."""
    xs, ys = [x for _, x, _ in points], [y for _, _, y in points]
    axes.plot(xs, ys, "o", color=PAPER_COLOR, label="LLaMA", zorder=5)
    for name, x, y in points:
        axes.annotate(
            name.upper(), (x, y), xytext=(8, 8), textcoords="offset points", fontsize=9, color=PAPER_COLOR
        )
    axes.plot(*optimum, "*", color=OPTIMUM_COLOR, markersize=18, label="optimum", zorder=4)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _around(centre: float, decades: float) -> list[float]:
    """Numbers at equal ratios on both sides of `centre`."""
    return [centre * 10 ** (decades * (2 * i / (_POINTS - 1) - 1)) for i in range(_POINTS)]
