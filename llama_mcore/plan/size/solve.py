"""`plan size`: the model to train, its number of tokens, and its cost over its lifetime. Imports no torch.

For a training budget, the answer is the model that takes all of it and is the cheapest of its loss over
training and inference together; for a loss, the cheapest model of that loss, within the budget if both are
given. Without inference both are the compute-optimal model. scaling.py has the formulas.
"""

import math
from dataclasses import dataclass, replace

from llama_mcore.errors import ConfigError, Problem, nearest
from llama_mcore.model.config import PRESETS, ModelConfig, Recompute
from llama_mcore.plan.arguments import all_of
from llama_mcore.plan.data import DataPlan, table_1_plan
from llama_mcore.plan.layout.flops import executed_flops, token_flops
from llama_mcore.plan.layout.hardware import Gpu
from llama_mcore.plan.layout.hardware import gpu as gpu_named
from llama_mcore.plan.size.energy import (
    PAPER_GPU_WATTS,
    PAPER_RUNS,
    co2_t,
    energy_mwh,
    gpu_hours_of_flops,
)
from llama_mcore.plan.size.scaling import DEFAULT_LAW, LAWS, PARAMETRIC_LAWS, Allocation, ParametricLaw
from llama_mcore.plan.size.shape import Shape, nearest_shape
from llama_mcore.units import parse_count

SMALLEST_BUDGET, LARGEST_BUDGET = 1e15, 1e30  # FLOPs
USUAL_MFU = 0.4
_DEARER = 1.05
"""Most that a shape of about the optimum's size may cost over its lifetime, relative to the optimum."""
_GPUS_PER_NODE = 8
_USUAL_DAYS = 30


@dataclass(frozen=True)
class Request:
    """Options of `plan size`; `flops`, `gpus`, `days` and `loss` are None if not given."""

    law_name: str
    gpu: Gpu
    mfu: float
    """Share of the GPU's peak, 6 N operations a token."""
    mfu_is_given: bool
    """If not, it is USUAL_MFU until a layout is found (with_layout.py)."""
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
    """A model and its cost; all GPU-hours, also of inference, are at the same speed."""

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
    """Implied by the GPU-hours."""
    best_for_inference_tokens: float
    over_cheapest: float
    """Its lifetime cost over that of the cheapest model of its loss, minus 1."""


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
    """Training the cheapest model of the requested loss would exceed the budget."""
    law_optima: dict[str, Allocation]
    """Optimum of each law at the optimum's training FLOPs."""
    paper: list[PaperModel]
    data: DataPlan

    @property
    def saving(self) -> float:
        """Share of lifetime cost that the recommended model saves against the compute-optimal of its loss."""
        other = self.request.law.optimum_of_loss(self.recommended.loss)
        return 1 - self.recommended.lifetime_flops / other.lifetime_flops(self.request.inference_tokens)

    @property
    def gpus(self) -> int:
        """Requested number of GPUs, else a power of two of nodes that trains it in 30 days.

        Most batches are divisible by a power of two.
        """
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
        """HFU with causal and with full attention counted."""
        executed = executed_flops(self.shape.model, recompute)
        per_operation = self.request.mfu / (6 * self.shape.params)
        return per_operation * executed.causal, per_operation * executed.full

    @property
    def layout_command(self) -> list[str]:
        """Command that finds layouts to train it."""
        tokens = f"{self.recommended.allocation.tokens / 1e9:.5g}B"
        where = ["--gpus", str(self.gpus), "--gpu", self.request.gpu.name]
        return ["llama-mcore", "plan", "layout", *self.shape.arguments, *where, "--tokens", tokens]


def parse_request(
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
    """Request from the options of `plan size`: numbers as text such as 1.4T, "" for those not given.

    Raises ConfigError with every problem.
    """
    found_gpu, share, served, count, length, budget, target, *_ = all_of(
        lambda: gpu_named(gpu),
        lambda: parse_count("--mfu", mfu, 0.001, 1) if mfu else USUAL_MFU,
        lambda: parse_count("--inference-tokens", inference_tokens, 0, 1e20),
        lambda: int(parse_count("--gpus", gpus, 1, 1e7, whole=True)) if gpus else None,
        lambda: parse_count("--days", days, 1e-3, 1e5) if days else None,
        lambda: parse_count("--flops", flops, SMALLEST_BUDGET, LARGEST_BUDGET) if flops else None,
        lambda: parse_count("--loss", loss, 0.001, 100) if loss else None,
        lambda: _check_budget(flops, gpus, days, loss),
        lambda: _check_law(law),
    )
    request = Request(law, found_gpu, share, bool(mfu), served, budget, count, length, target)
    request = with_mfu(request, share)
    _check_reachable(request)
    return request


def with_mfu(request: Request, mfu: float) -> Request:
    """The request at another MFU, which changes the budget of its GPUs and days."""
    flops = request.flops
    if request.gpus and request.days:
        flops = request.gpus * request.days * 86400 * request.gpu.peak.bf16_flops * mfu
    return replace(request, mfu=mfu, flops=flops)


def plan_size(request: Request) -> SizePlan:
    """The best model for a request. Raises ConfigError if no LLaMA-like shape is near its size."""
    law, served = request.law, request.inference_tokens
    optimum, binds = _optimum(request)
    loss = law.loss(optimum.params, optimum.tokens)
    shape, recommended = _shaped(request, optimum)
    flops = request.flops or optimum.training_flops
    return SizePlan(
        request=request,
        shape=shape,
        recommended=_cost(request, recommended),
        optimum=_cost(request, optimum),
        compute_optimal_same_loss=_cost(request, law.optimum_of_loss(loss)),
        compute_optimal_same_budget=_cost(request, law.optimum(flops)),
        budget_binds=binds,
        law_optima={name: each.optimum(flops) for name, each in LAWS.items()},
        paper=[_paper_model(name, law, served) for name in PAPER_RUNS],
        data=table_1_plan(recommended.tokens),
    )


def _check_budget(flops: str, gpus: str, days: str, loss: str) -> None:
    if flops and days:
        raise ConfigError(Problem("--days", days, "cannot be combined with --flops", "drop one of them"))
    if bool(gpus) != bool(days) and not flops:
        missing = "--days" if gpus else "--gpus"
        raise ConfigError(
            Problem(missing, "(not given)", "is required for a budget in GPUs and days", "add it")
        )
    if not (flops or gpus or loss):
        remedy = "give --flops 1e23, or --gpus 64 --gpu h100 --days 30, or --loss 2.0"
        raise ConfigError(
            Problem("--flops", "(not given)", "is required, or another budget or a loss", remedy)
        )


def _check_law(name: str) -> None:
    if name not in PARAMETRIC_LAWS:
        reason = "predicts no loss" if name in LAWS else "is not known"
        raise ConfigError(Problem("--law", name, reason, nearest(name, PARAMETRIC_LAWS)))


def _check_reachable(request: Request) -> None:
    """Raise ConfigError for a loss that no model within the budget reaches, or a budget out of bounds."""
    law, flops, loss = request.law, request.flops, request.loss
    if flops is not None and not SMALLEST_BUDGET <= flops <= LARGEST_BUDGET:
        reason = f"must be worth {SMALLEST_BUDGET:g} to {LARGEST_BUDGET:g} FLOPs of training"
        raise ConfigError(Problem("--gpus x --days", f"{flops:.2e} FLOPs", reason))
    if loss is None:
        return
    if loss <= law.irreducible:
        reason = f"must be above {law.irreducible:g}, the lowest loss under this law"
        raise ConfigError(Problem("--loss", f"{loss:g}", reason))
    least, most = law.optimum_of_loss(loss).training_flops, flops or LARGEST_BUDGET
    if least > most:
        best = law.optimum(most)
        reachable = math.ceil(1e4 * law.loss(best.params, best.tokens)) / 1e4
        reason = f"takes at least {least:.2e} FLOPs of training, but the budget is {most:.2e}"
        remedy = f"aim for {reachable:.4f}, or raise the budget"
        raise ConfigError(Problem("--loss", f"{loss:g}", reason, remedy))


def _optimum(request: Request) -> tuple[Allocation, bool]:
    """The best model, and True if the budget excludes a cheaper one."""
    law, served = request.law, request.inference_tokens
    if request.loss is None:
        assert request.flops is not None
        return law.cheapest_of_budget(request.flops, served), False
    cheapest = law.cheapest_of_loss(request.loss, served)
    within = law.cheapest_within(request.loss, request.flops or math.inf, served)
    assert within is not None  # _check_reachable
    return within, within != cheapest


def _shaped(request: Request, optimum: Allocation) -> tuple[Shape, Allocation]:
    """The nearest shape, with the tokens that spend the budget or reach the loss at its own size."""
    flops, loss, law = request.flops, request.loss, request.law
    highest_cost = _DEARER * optimum.lifetime_flops(request.inference_tokens)

    def tokens(params: float) -> float | None:
        if loss is not None:
            return law.tokens_for(loss, params)
        return flops / (6 * params) if flops else None

    def fits(params: float) -> bool:
        if not (count := tokens(params)):
            return False
        found = Allocation(params, count)
        within = not flops or found.training_flops <= flops * (1 + 1e-9)
        return within and found.lifetime_flops(request.inference_tokens) <= highest_cost

    shape = nearest_shape(optimum.params, fits)
    found = tokens(shape.params) if shape else None
    if not shape or not found:
        reason = f"leads to {optimum.params:.3g} parameters, and no LLaMA-like shape is near that"
        field, value = ("--loss", f"{loss:g}") if loss else ("budget", f"{flops:.2e} FLOPs")
        raise ConfigError(
            Problem(field, value, reason, "change it so that the model has 100M to 10T parameters")
        )
    return shape, Allocation(shape.params, found)


def _cost(request: Request, allocation: Allocation) -> Costed:
    hours = gpu_hours_of_flops(allocation.training_flops, request.gpu.peak.bf16_flops, request.mfu)
    return _costed(allocation, request.law, request.inference_tokens, hours, request.gpu.watts)


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
