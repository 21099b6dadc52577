"""llama_mcore.plan.size.solve: the questions that are asked of it, and the answers."""

import math

import pytest

from llama_mcore.errors import ConfigError, Problem
from llama_mcore.model.config import PRESETS, ModelConfig
from llama_mcore.plan.layout.flops import token_flops
from llama_mcore.plan.layout.hardware import GPUS
from llama_mcore.plan.size.report import notes, size_dict
from llama_mcore.plan.size.scaling import PARAMETRIC_LAWS
from llama_mcore.plan.size.solve import SizePlan, parse_request, plan_size
from tests.support.errors import check_problem

LAW = PARAMETRIC_LAWS["epoch"]
CLUSTER = {"gpus": "64", "gpu": "h100", "days": "30"}
CLUSTER_FLOPS = 64 * 30 * 86400 * 989.4e12 * 0.4


def answer(**asked: str) -> SizePlan:
    return plan_size(parse_request(**asked))


def problems(**asked: str) -> list[Problem]:
    with pytest.raises(ConfigError) as caught:
        answer(**asked)
    return caught.value.problems


def test_gpus_and_days_for_ten_trillion_tokens_of_inference() -> None:
    plan = answer(**CLUSTER, inference_tokens="10T")
    found = plan.recommended
    assert plan.request.flops == pytest.approx(CLUSTER_FLOPS)
    assert found.training_flops == pytest.approx(CLUSTER_FLOPS)
    assert found.training_gpu_hours == pytest.approx(64 * 30 * 24)
    assert plan.days == pytest.approx(30)
    assert found.lifetime_flops == pytest.approx(CLUSTER_FLOPS + 2 * plan.shape.params * 1e13)
    assert found.lifetime_gpu_hours / found.training_gpu_hours == pytest.approx(
        found.lifetime_flops / CLUSTER_FLOPS
    )
    # The law's own best for this budget and this much inference, in a shape that costs within 2 % of it.
    assert LAW.inference_it_is_best_for(plan.optimum.allocation) == pytest.approx(1e13, rel=1e-6)
    assert found.lifetime_flops == pytest.approx(plan.optimum.lifetime_flops, rel=0.02)
    assert plan.optimum.allocation.params < plan.compute_optimal_same_loss.allocation.params / 2
    assert plan.saving > 0.4


def test_without_inference_the_answer_is_compute_optimal() -> None:
    plan = answer(flops="5.76e23")
    assert plan.optimum == plan.compute_optimal_same_budget
    assert plan.optimum.lifetime_flops == plan.optimum.training_flops
    assert plan.compute_optimal_same_loss.allocation.params == pytest.approx(plan.optimum.allocation.params)
    # the shape is not quite of the optimum's size, around which the cost is flat
    assert -0.01 < plan.saving <= 0
    assert plan.optimum.allocation.params == pytest.approx(72e9, abs=0.5e9)


def test_a_loss_alone_is_reached_at_the_least_lifetime_cost() -> None:
    plan = answer(loss="2.05", inference_tokens="2T")
    assert plan.optimum.loss == pytest.approx(2.05)
    assert plan.recommended.loss == pytest.approx(2.05)
    assert plan.optimum.lifetime_flops == pytest.approx(LAW.cheapest_of_loss(2.05, 2e12).lifetime_flops(2e12))
    assert not plan.budget_binds


def test_a_shape_too_small_for_the_loss_is_passed_over() -> None:
    """With endless inference the optimum is hardly larger than a model that never gets there: here the 7B."""
    plan = answer(loss="2.0", inference_tokens="1e20")
    assert LAW.tokens_for(2.0, 6_738_415_616) is None
    assert plan.shape.preset is None
    assert plan.recommended.loss == pytest.approx(2.0)


def test_a_budget_can_bind_a_loss() -> None:
    least = LAW.optimum_of_loss(2.05).training_flops
    plan = answer(loss="2.05", inference_tokens="100T", flops=f"{1.5 * least:.6e}")
    assert plan.budget_binds
    assert plan.optimum.training_flops == pytest.approx(1.5 * least, rel=1e-5)
    assert any("budget binds" in note for note in notes(plan))
    assert not answer(loss="2.05", flops=f"{1.5 * least:.6e}").budget_binds


def test_where_llama_stands() -> None:
    plan = answer(flops="1e23", inference_tokens="1T")
    seven, _, _, largest = plan.paper
    assert [model.name for model in plan.paper] == ["7b", "13b", "33b", "65b"]
    assert seven.costed.allocation.tokens_per_param == pytest.approx(1e12 / 6_738_415_616)
    assert seven.costed.loss == pytest.approx(2.086, abs=1e-3)
    assert seven.costed.training_gpu_hours == 82_432
    assert seven.tokens_per_s_per_gpu == pytest.approx(3370, abs=1)
    assert seven.costed.lifetime_flops == pytest.approx(6 * 6_738_415_616e12 + 2 * 6_738_415_616e12)
    assert largest.costed.training_mwh == pytest.approx(449, abs=1)
    assert largest.costed.training_co2_t == pytest.approx(173, abs=0.9)
    assert largest.tokens_per_s_per_gpu == pytest.approx(380, rel=0.01)
    assert largest.costed.allocation.tokens_per_param == pytest.approx(21.4, abs=0.05)
    assert all(model.over_cheapest >= 0 for model in plan.paper)


def test_a_paper_model_is_the_cheapest_for_the_inference_that_is_said() -> None:
    said = answer(flops="1e23").paper[0].best_for_inference_tokens
    assert answer(flops="1e23", inference_tokens=f"{said:.10e}").paper[0].over_cheapest == pytest.approx(
        0, abs=1e-9
    )


def test_the_next_command_names_what_was_found() -> None:
    preset = answer(flops=f"{6 * 6.74e9 * 1e12}", inference_tokens="3.2T")
    assert preset.shape.preset == "7b"
    command = preset.layout_command
    assert command[:5] == ["llama-mcore", "plan", "layout", "--model", "7b"]
    drawn = answer(**CLUSTER, inference_tokens="10T")
    options = dict(zip(drawn.layout_command[3::2], drawn.layout_command[4::2], strict=True))
    assert options["--gpus"] == "64"
    assert options["--gpu"] == "h100"
    assert options["--hidden-size"] == str(drawn.shape.model.hidden_size)
    assert options["--tokens"].endswith("B")
    assert float(options["--tokens"][:-1]) * 1e9 == pytest.approx(
        drawn.recommended.allocation.tokens, rel=1e-4
    )
    assert size_dict(drawn)["next_command"] == " ".join(drawn.layout_command)


def test_gpus_that_nobody_named_train_within_a_month() -> None:
    """The command is for a power of two of nodes, and half of them would not do."""
    plan = answer(flops="1e23", gpu="h200")
    nodes = plan.gpus // 8
    assert plan.gpus == 8 * nodes
    assert nodes.bit_count() == 1
    assert plan.days <= 30 < 2 * plan.days


@pytest.mark.parametrize(
    ("flops", "loss", "served"), [("1e24", "1.969712", "100T"), ("3e23", "1.995834", "10T")]
)
def test_no_shape_exceeds_the_budget_beside_a_loss(flops: str, loss: str, served: str) -> None:
    plan = answer(flops=flops, loss=loss, inference_tokens=served)
    assert plan.recommended.training_flops <= float(flops) * (1 + 1e-6)
    assert plan.recommended.loss == pytest.approx(float(loss))


def test_a_shape_costs_about_what_the_optimum_does() -> None:
    plan = answer(loss="2.0", inference_tokens="1e20")
    assert plan.recommended.lifetime_flops <= 1.05 * plan.optimum.lifetime_flops


def test_gpus_beside_flops_give_the_days() -> None:
    plan = answer(flops=f"{CLUSTER_FLOPS:.10e}", gpus="128", gpu="h100")
    assert plan.days == pytest.approx(15)


def test_mfu_in_every_count() -> None:
    plan = answer(flops="1e23", inference_tokens="3T", mfu="0.5")
    model, params = plan.shape.model, plan.shape.params
    speed = plan.tokens_per_s_per_gpu
    assert speed == pytest.approx(0.5 * 312e12 / (6 * params))
    assert plan.mfu_causal == pytest.approx(speed * token_flops(model).causal / 312e12)
    assert plan.mfu_full == pytest.approx(speed * token_flops(model).full / 312e12)
    assert plan.hfu("full")[0] > plan.hfu("selective")[0] == plan.hfu("none")[0] > plan.mfu_causal


def test_more_tokens_than_table_1_has_is_said() -> None:
    def data_notes(tokens: float) -> list[str]:
        return [
            note
            for note in notes(answer(flops=f"{6 * 7e9 * tokens:.6e}", inference_tokens="8T"))
            if "Table 1" in note
        ]

    assert not data_notes(3e11)
    few = data_notes(2e12)
    assert len(few) == 1
    assert "wikipedia" in few[0]
    assert "Muennighoff" not in few[0]
    assert "Muennighoff" in data_notes(2e13)[0]


def test_ratios_beyond_those_that_were_fitted_are_said() -> None:
    def doubted(inference: str) -> bool:
        return any("overrate" in note for note in notes(answer(flops="1e23", inference_tokens=inference)))

    assert doubted("10T")
    assert not doubted("0")


def test_what_the_rounded_constants_do_is_said_and_they_can_be_asked_for() -> None:
    assert any("mislead" in note for note in notes(answer(flops="1e23")))
    printed = answer(flops="5.76e23", law="hoffmann-3")
    assert printed.optimum.allocation.tokens_per_param == pytest.approx(92.6, abs=0.05)


def test_laws_share_the_budget() -> None:
    plan = answer(**CLUSTER)
    assert set(plan.law_optima) == {
        "epoch",
        "hoffmann-1",
        "hoffmann-2",
        "hoffmann-3",
        "hoffmann-3-unrounded",
        "kaplan",
    }
    assert [found.training_flops for found in plan.law_optima.values()] == pytest.approx([CLUSTER_FLOPS] * 6)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("flops", bad) for bad in ("0", "-1", "nan", "inf", "1e400", "1e9", "many", "", "1e")),
        *(("inference_tokens", bad) for bad in ("-1", "nan", "1e400", "x", "1e30")),
        *(("mfu", bad) for bad in ("0", "1.5", "-0.4", "nan", "40%")),
        *(("loss", bad) for bad in ("0", "-2", "nan", "1.8172", "1.5", "500", "two")),
        ("gpu", "h1000"),
        ("law", "chinchilla"),
        ("law", "kaplan"),
        ("gpus", "0"),
        ("gpus", "2.5"),
        ("days", "30"),
    ],
)
def test_impossible_arguments_are_refused_by_name(field: str, value: str) -> None:
    found = problems(**{"flops": "1e23", field: value})
    assert len(found) == 1
    check_problem(found, f"--{field.replace('_', '-')}", value or "(not given)", remedy=False)


@pytest.mark.parametrize(("field", "bad", "meant"), [("gpu", "h10", "h100"), ("law", "epoc", "epoch")])
def test_the_nearest_name_is_suggested(field: str, bad: str, meant: str) -> None:
    (problem,) = problems(**{"flops": "1e23", field: bad})
    assert problem.remedy == f"did you mean {meant}?"


@pytest.mark.parametrize(("name", "listed"), [("b200", "b200"), ("a100", "a100-80gb"), ("H100-SXM", "h100")])
def test_every_gpu_of_the_table_and_its_other_names(name: str, listed: str) -> None:
    plan = answer(flops="1e23", gpu=name)
    assert plan.request.gpu is GPUS[listed]
    assert plan.recommended.training_mwh == pytest.approx(
        plan.recommended.training_gpu_hours * GPUS[listed].watts * 1.1 / 1e6
    )


def test_all_problems_are_told_at_once() -> None:
    found = problems(gpus="0", days="nan", gpu="v100", mfu="2", inference_tokens="-1", law="x")
    assert len(found) == 6


@pytest.mark.parametrize(
    ("asked", "field"), [({}, "--flops"), ({"gpus": "8"}, "--days"), ({"days": "8"}, "--gpus")]
)
def test_half_a_budget_is_refused(asked: dict[str, str], field: str) -> None:
    assert [problem.field for problem in problems(**asked)] == [field]


def test_a_loss_that_the_budget_does_not_buy_names_the_one_that_it_does() -> None:
    (found,) = problems(flops="1e21", loss="2.0")
    reachable = found.remedy.split("aim for ")[1].split(",")[0]
    best = LAW.optimum(1e21)
    assert 0 <= float(reachable) - LAW.loss(best.params, best.tokens) <= 1e-4
    assert answer(flops="1e21", loss=reachable).recommended.loss == pytest.approx(float(reachable))


def test_a_loss_beyond_any_budget_is_refused() -> None:
    check_problem(problems(loss="1.8173"), "--loss", 1.8173)


def test_gpus_that_come_to_no_budget_are_refused() -> None:
    check_problem(problems(gpus="1", days="0.001", mfu="0.001"), "--gpus x --days", remedy=False)


def test_a_model_of_no_size_is_refused() -> None:
    check_problem(problems(flops="1e15"), "budget")


def test_every_figure_in_json_is_finite() -> None:
    def figures(value: object) -> list[float]:
        children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        return [n for child in children for n in figures(child)] + (
            [value] if isinstance(value, float) else []
        )

    for asked in ({"flops": "1e20"}, {"flops": "1e29"}, {"loss": "1.9", "inference_tokens": "1e20"}):
        found = figures(size_dict(answer(**asked)))
        assert len(found) > 100
        assert all(map(math.isfinite, found))


def test_presets_are_the_papers() -> None:
    """The planner's LLaMA is the one that the presets build."""
    plan = answer(flops="1e23")
    assert [model.costed.allocation.params for model in plan.paper] == [
        ModelConfig.model_validate(PRESETS[name]).num_params() for name in ("7b", "13b", "33b", "65b")
    ]
