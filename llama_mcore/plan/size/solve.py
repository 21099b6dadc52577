"""`plan size`: which model to train, on how many tokens, and what it costs over its life. Imports no torch.

The answer to a training budget is the model that takes all of it and that no model of equal loss undercuts
over training and inference together; to a loss, the one of that loss that costs least, within the budget if
both are given. Without inference both are the compute-optimal model. scaling.py has the formulas.
"""

import math
from dataclasses import dataclass, replace

from llama_mcore.errors import ConfigError, Problem, nearest
from llama_mcore.model.config import PRESETS, ModelConfig, Recompute
from llama_mcore.plan.arguments import listed_gpu, number
from llama_mcore.plan.data import DataPlan, table_1_plan
from llama_mcore.plan.layout.flops import executed_flops, token_flops
from llama_mcore.plan.layout.hardware import Gpu
from llama_mcore.plan.size.energy import (
    PAPER_GPU_WATTS,
    PAPER_RUNS,
    co2_t,
    energy_mwh,
    gpu_hours_of_flops,
)
from llama_mcore.plan.size.scaling import DEFAULT_LAW, LAWS, PARAMETRIC_LAWS, Allocation, ParametricLaw
from llama_mcore.plan.size.shape import Shape, nearest_shape

SMALLEST_BUDGET, LARGEST_BUDGET = 1e15, 1e30  # FLOPs
USUAL_MFU = 0.4
_DEARER = 1.05
"""Than the optimum, over its life: what a shape may be that has about its size."""
_GPUS_PER_NODE = 8
_USUAL_DAYS = 30


@dataclass(frozen=True)
class Request:
    """What was asked; `flops`, `gpus`, `days` and `loss` are None where nothing was said of them."""

    law_name: str
    gpu: Gpu
    mfu: float
    """Share of the GPU's peak, 6 N operations a token."""
    mfu_is_given: bool
    """Else it is USUAL_MFU, until a layout is found that says better (with_layout.py)."""
    inference_tokens: float
    flops: float | None = None
    gpus: int | None = None
    days: float | None = None
    loss: float | None = None

    @property
    def law(self) -> ParametricLaw:
        return PARAMETRIC_LAWS[self.law_name]


@dataclass(frozen=True)
class Costed:
    """A model with what it costs: all GPU-hours, inference too, at the same speed."""

    allocation: Allocation
    loss: float
    training_flops: float
    lifetime_flops: float
    training_gpu_hours: float
    lifetime_gpu_hours: float
    training_mwh: float
    lifetime_mwh: float
    training_co2_t: float
    lifetime_co2_t: float


@dataclass(frozen=True)
class PaperModel:
    """A LLaMA of the paper, with Table 15's GPU-hours."""

    name: str
    costed: Costed
    tokens_per_s_per_gpu: float
    """As the GPU-hours imply."""
    best_for_inference_tokens: float
    over_cheapest: float
    """Its lifetime cost by that of the cheapest model of its loss, less 1."""


@dataclass(frozen=True)
class SizePlan:
    """The answer. `recommended` is `optimum` in the nearest LLaMA-like shape."""

    request: Request
    shape: Shape
    recommended: Costed
    optimum: Costed
    compute_optimal_same_loss: Costed
    compute_optimal_same_budget: Costed
    budget_binds: bool
    """The cheapest model of the loss that was asked for would cost more to train than the budget."""
    law_optima: dict[str, Allocation]
    """By law, for the FLOPs that the optimum is trained with."""
    paper: list[PaperModel]
    data: DataPlan

    @property
    def saving(self) -> float:
        """How much less the recommended model costs over its life than the compute-optimal of its loss."""
        other = self.request.law.optimum_of_loss(self.recommended.loss)
        return 1 - self.recommended.lifetime_flops / other.lifetime_flops(self.request.inference_tokens)

    @property
    def gpus(self) -> int:
        """Those asked for, else a power of two of nodes that trains it in 30 days: most batches are shared
        evenly by so many."""
        if self.request.gpus:
            return self.request.gpus
        nodes = self.recommended.training_gpu_hours / (24 * _USUAL_DAYS * _GPUS_PER_NODE)
        return _GPUS_PER_NODE * 2 ** max(0, math.ceil(math.log2(nodes)))

    @property
    def days(self) -> float:
        return self.recommended.training_gpu_hours / self.gpus / 24

    @property
    def tokens_per_s_per_gpu(self) -> float:
        return self.recommended.allocation.tokens / self.recommended.training_gpu_hours / 3600

    @property
    def mfu_causal(self) -> float:
        return self.request.mfu * token_flops(self.shape.model).causal / (6 * self.shape.params)

    @property
    def mfu_full(self) -> float:
        return self.request.mfu * token_flops(self.shape.model).full / (6 * self.shape.params)

    def hfu(self, recompute: Recompute) -> tuple[float, float]:
        """With causal and with full attention counted."""
        executed = executed_flops(self.shape.model, recompute)
        per_operation = self.request.mfu / (6 * self.shape.params)
        return per_operation * executed.causal, per_operation * executed.full

    @property
    def layout_command(self) -> list[str]:
        """The command that finds how to train it."""
        tokens = f"{self.recommended.allocation.tokens / 1e9:.5g}B"
        where = ["--gpus", str(self.gpus), "--gpu", self.request.gpu.name]
        return ["llama-mcore", "plan", "layout", *self.shape.arguments, *where, "--tokens", tokens]


def request(
    *,
    flops: str = "",
    gpus: str = "",
    gpu: str = "a100-80gb",
    days: str = "",
    mfu: str = "",
    inference_tokens: str = "0",
    loss: str = "",
    law: str = DEFAULT_LAW,
) -> Request:
    """What the command line asks for, numbers as people write them and "" for what is not said.

    Raises ConfigError with every problem.
    """
    problems: list[Problem] = []
    found_gpu = listed_gpu(problems, gpu)
    share = number(problems, "--mfu", mfu, 0.001, 1) if mfu else USUAL_MFU
    served = number(problems, "--inference-tokens", inference_tokens, 0, 1e20)
    count = int(number(problems, "--gpus", gpus, 1, 1e7, whole=True)) if gpus else None
    length = number(problems, "--days", days, 1e-3, 1e5) if days else None
    budget = number(problems, "--flops", flops, SMALLEST_BUDGET, LARGEST_BUDGET) if flops else None
    target = number(problems, "--loss", loss, 0.001, 100) if loss else None
    problems += _check_budget(flops, gpus, days, loss) + _check_law(law)
    if problems or not found_gpu:
        raise ConfigError(problems)
    asked = Request(law, found_gpu, share, bool(mfu), served, budget, count, length, target)
    asked = at_mfu(asked, share)
    if asked_too_much := _check_reachable(asked):
        raise ConfigError(asked_too_much)
    return asked


def at_mfu(asked: Request, mfu: float) -> Request:
    """The same at another MFU, which says what GPUs and days come to."""
    flops = asked.flops
    if asked.gpus and asked.days:
        flops = asked.gpus * asked.days * 86400 * asked.gpu.peak.bf16_flops * mfu
    return replace(asked, mfu=mfu, flops=flops)


def plan_size(asked: Request) -> SizePlan:
    """Raises ConfigError where no LLaMA-like shape is of the size that comes out."""
    law, served = asked.law, asked.inference_tokens
    optimum, binds = _optimum(asked)
    loss = law.loss(optimum.params, optimum.tokens)
    shape, recommended = _shaped(asked, optimum)
    flops = asked.flops or optimum.training_flops
    return SizePlan(
        request=asked,
        shape=shape,
        recommended=_cost(asked, recommended),
        optimum=_cost(asked, optimum),
        compute_optimal_same_loss=_cost(asked, law.optimum_of_loss(loss)),
        compute_optimal_same_budget=_cost(asked, law.optimum(flops)),
        budget_binds=binds,
        law_optima={name: each.optimum(flops) for name, each in LAWS.items()},
        paper=[_paper_model(name, law, served) for name in PAPER_RUNS],
        data=table_1_plan(recommended.tokens),
    )


def _check_budget(flops: str, gpus: str, days: str, loss: str) -> list[Problem]:
    if flops and days:
        return [Problem("--days", days, "says the budget again, beside --flops", "drop one of them")]
    if bool(gpus) != bool(days) and not flops:
        missing = "--days" if gpus else "--gpus"
        return [Problem(missing, "(not given)", "is required for a budget of GPUs and days", "add it")]
    if not (flops or gpus or loss):
        remedy = "give --flops 1e23, or --gpus 64 --gpu h100 --days 30, or --loss 2.0"
        return [Problem("--flops", "(not given)", "a budget or a loss is required", remedy)]
    return []


def _check_law(name: str) -> list[Problem]:
    if name in PARAMETRIC_LAWS:
        return []
    reason = "says no loss" if name in LAWS else "is not known"
    return [Problem("--law", name, reason, nearest(name, PARAMETRIC_LAWS))]


def _check_reachable(asked: Request) -> list[Problem]:
    """A loss below what text allows, or than what the budget buys; a budget beyond all bounds."""
    law, flops = asked.law, asked.flops
    if flops is not None and not SMALLEST_BUDGET <= flops <= LARGEST_BUDGET:
        reason = f"must come to {SMALLEST_BUDGET:g} to {LARGEST_BUDGET:g} FLOPs of training"
        return [Problem("--gpus x --days", f"{flops:.2e} FLOPs", reason)]
    if asked.loss is None:
        return []
    if asked.loss <= law.irreducible:
        reason = f"must be above {law.irreducible:g}, which no model of this law gets below"
        return [Problem("--loss", f"{asked.loss:g}", reason)]
    least = law.optimum_of_loss(asked.loss).training_flops
    most = flops or LARGEST_BUDGET
    if least > most:
        best = law.optimum(most)
        reachable = math.ceil(1e4 * law.loss(best.params, best.tokens)) / 1e4
        reason = f"takes at least {least:.2e} FLOPs of training, and the budget is {most:.2e}"
        return [Problem("--loss", f"{asked.loss:g}", reason, f"aim for {reachable:.4f}, or raise the budget")]
    return []


def _optimum(asked: Request) -> tuple[Allocation, bool]:
    """The best model, and whether the budget kept it from costing less."""
    law, served = asked.law, asked.inference_tokens
    if asked.loss is None:
        assert asked.flops is not None
        return law.cheapest_of_budget(asked.flops, served), False
    cheapest = law.cheapest_of_loss(asked.loss, served)
    within = law.cheapest_within(asked.loss, asked.flops or math.inf, served)
    assert within is not None  # _check_reachable
    return within, within != cheapest


def _shaped(asked: Request, optimum: Allocation) -> tuple[Shape, Allocation]:
    """The nearest shape, with the tokens that spend the budget, or reach the loss within it, at its own
    size."""
    flops, loss, law = asked.flops, asked.loss, asked.law
    dearest = _DEARER * optimum.lifetime_flops(asked.inference_tokens)

    def tokens(params: float) -> float | None:
        if loss is not None:
            return law.tokens_for(loss, params)
        return flops / (6 * params) if flops else None

    def fits(params: float) -> bool:
        if not (count := tokens(params)):
            return False
        found = Allocation(params, count)
        within = not flops or found.training_flops <= flops * (1 + 1e-9)
        return within and found.lifetime_flops(asked.inference_tokens) <= dearest

    shape = nearest_shape(optimum.params, fits)
    found = tokens(shape.params) if shape else None
    if not shape or not found:
        reason = f"asks for {optimum.params:.3g} parameters, and no LLaMA-like shape is near that"
        field, value = ("--loss", f"{loss:g}") if loss else ("budget", f"{flops:.2e} FLOPs")
        raise ConfigError(Problem(field, value, reason, "ask for a model of 100M to 10T parameters"))
    return shape, Allocation(shape.params, found)


def _cost(asked: Request, allocation: Allocation) -> Costed:
    hours = gpu_hours_of_flops(allocation.training_flops, asked.gpu.peak.bf16_flops, asked.mfu)
    return _costed(allocation, asked.law, asked.inference_tokens, hours, asked.gpu.watts)


def _costed(
    allocation: Allocation, law: ParametricLaw, inference_tokens: float, training_hours: float, watts: float
) -> Costed:
    lifetime = allocation.lifetime_flops(inference_tokens)
    lifetime_hours = training_hours * lifetime / allocation.training_flops
    training_mwh, lifetime_mwh = energy_mwh(training_hours, watts), energy_mwh(lifetime_hours, watts)
    return Costed(
        allocation=allocation,
        loss=law.loss(allocation.params, allocation.tokens),
        training_flops=allocation.training_flops,
        lifetime_flops=lifetime,
        training_gpu_hours=training_hours,
        lifetime_gpu_hours=lifetime_hours,
        training_mwh=training_mwh,
        lifetime_mwh=lifetime_mwh,
        training_co2_t=co2_t(training_mwh),
        lifetime_co2_t=co2_t(lifetime_mwh),
    )


def _paper_model(name: str, law: ParametricLaw, inference_tokens: float) -> PaperModel:
    run = PAPER_RUNS[name]
    allocation = Allocation(ModelConfig.model_validate(PRESETS[name]).num_params(), run.tokens)
    costed = _costed(allocation, law, inference_tokens, run.gpu_hours, PAPER_GPU_WATTS)
    cheapest = law.cheapest_of_loss(costed.loss, inference_tokens).lifetime_flops(inference_tokens)
    return PaperModel(
        name=name,
        costed=costed,
        tokens_per_s_per_gpu=run.tokens / run.gpu_hours / 3600,
        best_for_inference_tokens=law.inference_it_is_best_for(allocation),
        over_cheapest=costed.lifetime_flops / cheapest - 1,
    )
