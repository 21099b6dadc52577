"""llama_mcore.plan.size.scaling against published figures, and its optima against brute force."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_mcore.plan.size.scaling import (
    LAWS,
    PARAMETRIC_LAWS,
    PF_DAY,
    ROUNDING,
    Allocation,
    ParametricLaw,
    kaplan_loss,
)

EPOCH = PARAMETRIC_LAWS["epoch"]
CHINCHILLA_FLOPS = 5.76e23
LLAMA = [
    (6_738_415_616, 1.0e12),
    (13_015_864_320, 1.0e12),
    (32_528_943_616, 1.4e12),
    (65_285_660_672, 1.4e12),
]

# Sardana et al. (2401.00448), appendix A: the constants that they compute with.
SARDANA = ParametricLaw("Sardana", 1.69, 406.4, 410.7, 0.336, 0.283)


# Worked out by hand from eq. 4 of Hoffmann et al.; printed with as many digits as stand here.
@pytest.mark.parametrize(
    ("name", "params", "tokens", "ratio"),
    [
        ("hoffmann-3", 32e9, 2.98e12, 92.6),
        ("hoffmann-3-unrounded", 40e9, 2.38e12, 59.1),
        ("epoch", 72e9, 1.33e12, 18.4),
    ],
)
def test_best_model_for_chinchillas_budget(name: str, params: float, tokens: float, ratio: float) -> None:
    found = LAWS[name].optimum(CHINCHILLA_FLOPS)
    assert found.params == pytest.approx(params, abs=0.5e9)
    assert found.tokens == pytest.approx(tokens, abs=0.005e12)
    assert found.tokens_per_param == pytest.approx(ratio, abs=0.05)
    assert found.training_flops == pytest.approx(CHINCHILLA_FLOPS)


@pytest.mark.parametrize(
    ("name", "losses"),
    [("hoffmann-3", [2.054, 2.017, 1.962, 1.939]), ("epoch", [2.086, 2.049, 1.999, 1.976])],
)
def test_expected_loss_of_llama(name: str, losses: list[float]) -> None:
    law = PARAMETRIC_LAWS[name]
    assert [law.loss(*model) for model in LLAMA] == pytest.approx(
        losses, abs=1e-3
    )  # a unit of the last digit


def test_what_is_said_of_the_rounded_constants_is_so() -> None:
    """93 tokens a parameter; 18 to 25 by the others."""
    ratios = {name: law.optimum(CHINCHILLA_FLOPS).tokens_per_param for name, law in LAWS.items()}
    assert f"{ratios['hoffmann-3']:.0f} tokens" in ROUNDING
    others = [int(ratios[name]) for name in ("hoffmann-1", "hoffmann-2", "epoch")]
    assert f"{min(others)} to {max(others)}" in ROUNDING


# Hoffmann et al., Tables 3 (approach 1) and A3 (approach 2). How far the exponent may be off: the wider half
# of its interval in Table 2.
EXPONENT_INTERVAL = {"hoffmann-1": 0.012, "hoffmann-2": 0.044}


@pytest.mark.parametrize(
    ("name", "params", "flops"),
    [
        ("hoffmann-1", 1e9, 1.21e20),
        ("hoffmann-1", 10e9, 1.23e22),
        ("hoffmann-1", 175e9, 3.85e24),
        ("hoffmann-2", 1e9, 1.20e20),
        ("hoffmann-2", 10e9, 1.32e22),
        ("hoffmann-2", 175e9, 4.54e24),
    ],
)
def test_approaches_1_and_2_at_the_papers_other_sizes(name: str, params: float, flops: float) -> None:
    law = LAWS[name]
    assert not isinstance(law, ParametricLaw)
    tolerance = EXPONENT_INTERVAL[name] * abs(math.log(flops / law.flops))
    assert math.log(law.optimum(flops).params / params) == pytest.approx(0, abs=tolerance)


def test_kaplan() -> None:
    """Table 6: 1.3e9 parameters for one PF-day. Each side of the loss alone is a power law (eq. 1.5)."""
    assert LAWS["kaplan"].optimum(PF_DAY).params == pytest.approx(1.3e9)
    ratio = LAWS["kaplan"].optimum(1e4 * PF_DAY).params / 1.3e9
    assert math.log10(ratio) == pytest.approx(4 * 0.73)
    assert kaplan_loss(1e9, 1e300) == pytest.approx((6.4e13 / 1e9) ** 0.076)
    assert kaplan_loss(1e300, 1e9) == pytest.approx((1.8e13 / 1e9) ** 0.103)


def test_the_example_of_sardana() -> None:
    """13B quality for 2T tokens of inference: train 7B longer, and 1.7e22 FLOPs, 17 %, are saved."""
    inference = 2e12
    flops = _root_by_halving(lambda c: SARDANA.optimum(c).params - 13e9, 1e20, 1e26)
    chinchilla = SARDANA.optimum(flops)
    best = SARDANA.cheapest_of_loss(SARDANA.loss(chinchilla.params, chinchilla.tokens), inference)
    before, after = chinchilla.lifetime_flops(inference), best.lifetime_flops(inference)
    assert best.params == pytest.approx(7e9, rel=0.01)
    assert before - after == pytest.approx(1.7e22, abs=0.05e22)
    assert 1 - after / before == pytest.approx(0.17, abs=0.005)


@pytest.mark.parametrize("law", PARAMETRIC_LAWS.values(), ids=PARAMETRIC_LAWS)
def test_no_model_of_the_budget_has_less_loss(law: ParametricLaw) -> None:
    best = law.optimum(1e23)
    least = min(law.loss(n, 1e23 / (6 * n)) for n in _grid(best.params, 4000))
    assert law.loss(best.params, best.tokens) <= least * (1 + 1e-12)
    assert law.optimum_of_loss(law.loss(best.params, best.tokens)).params == pytest.approx(best.params)


@pytest.mark.parametrize("inference", [0.0, 1e9, 1e12, 1e13, 1e16])
@pytest.mark.parametrize("loss", [1.85, 2.0, 2.3, 3.0])
@pytest.mark.parametrize("law", [EPOCH, PARAMETRIC_LAWS["hoffmann-3"]], ids=["epoch", "hoffmann-3"])
def test_no_model_of_the_loss_costs_less(law: ParametricLaw, loss: float, inference: float) -> None:
    best = law.cheapest_of_loss(loss, inference)
    assert law.loss(best.params, best.tokens) == pytest.approx(loss, abs=1e-9)
    costs = {
        n: Allocation(n, tokens).lifetime_flops(inference)
        for n in _grid(best.params, 4000)
        if (tokens := law.tokens_for(loss, n)) is not None
    }
    cheapest = min(costs, key=lambda n: costs[n])
    step = 100 ** (1 / 2000)  # of the grid: the minimum lies within one
    assert best.lifetime_flops(inference) <= costs[cheapest] * (1 + 1e-12)
    assert 1 / step <= cheapest / best.params <= step


@settings(deadline=None)
@given(
    flops=st.floats(1e18, 1e28),
    inference=st.one_of(st.just(0.0), st.floats(1e6, 1e18)),
    name=st.sampled_from(sorted(PARAMETRIC_LAWS)),
)
def test_the_answer_to_a_budget_spends_it_and_is_cheapest_of_its_loss(
    flops: float, inference: float, name: str
) -> None:
    law = PARAMETRIC_LAWS[name]
    found = law.cheapest_of_budget(flops, inference)
    assert found.training_flops == pytest.approx(flops, rel=1e-9)
    best = law.cheapest_of_loss(law.loss(found.params, found.tokens), inference)
    # The two roots lie on paths of other slopes; a cost at its minimum hardly feels that.
    assert best.lifetime_flops(inference) == pytest.approx(found.lifetime_flops(inference), rel=1e-9)
    assert best.params == pytest.approx(found.params, rel=1e-5)


def test_more_inference_asks_for_a_smaller_model() -> None:
    found = [EPOCH.cheapest_of_budget(1e23, tokens) for tokens in (0, 1e11, 1e12, 1e13, 1e14)]
    assert [model.params for model in found] == sorted((model.params for model in found), reverse=True)
    assert found[0] == EPOCH.optimum(1e23)


def test_inference_that_a_model_is_best_for() -> None:
    """The way back from an answer to the question; a model larger than compute-optimal is best for none."""
    best = EPOCH.cheapest_of_loss(2.05, 3e12)
    assert EPOCH.inference_it_is_best_for(best) == pytest.approx(3e12, rel=1e-6)
    assert EPOCH.inference_it_is_best_for(Allocation(175e9, 300e9)) < 0  # GPT-3


def test_a_budget_that_allows_the_cheapest_changes_nothing() -> None:
    best = EPOCH.cheapest_of_loss(2.05, 1e13)
    assert EPOCH.cheapest_within(2.05, best.training_flops * 1.01, 1e13) == best


def test_a_budget_below_the_cheapest_is_spent() -> None:
    least, best = EPOCH.optimum_of_loss(2.05), EPOCH.cheapest_of_loss(2.05, 1e13)
    budget = math.sqrt(least.training_flops * best.training_flops)
    found = EPOCH.cheapest_within(2.05, budget, 1e13)
    assert found is not None
    assert found.training_flops == pytest.approx(budget, rel=1e-9)
    assert EPOCH.loss(found.params, found.tokens) == pytest.approx(2.05, abs=1e-9)
    in_budget = [
        cost
        for n in _grid(best.params, 4000)
        if (tokens := EPOCH.tokens_for(2.05, n)) is not None
        for model in [Allocation(n, tokens)]
        if model.training_flops <= budget
        for cost in [model.lifetime_flops(1e13)]
    ]
    assert found.lifetime_flops(1e13) <= min(in_budget) * (1 + 1e-9)


def test_a_budget_below_the_least_training_buys_no_such_model() -> None:
    assert EPOCH.cheapest_within(2.05, EPOCH.optimum_of_loss(2.05).training_flops * 0.99, 1e13) is None


def test_a_small_model_does_not_come_to_a_low_loss() -> None:
    assert EPOCH.tokens_for(2.0, 1e8) is None


def _grid(centre: float, count: int) -> list[float]:
    """Grid from a hundredth to a hundred times `centre`."""
    return [centre * 100 ** (2 * i / count - 1) for i in range(count + 1)]


def _root_by_halving(function, low: float, high: float) -> float:
    for _ in range(200):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if function(middle) < 0 else (low, middle)
    return low
