"""llama_mcore.plan.layout.search: what it offers is valid and fits, the fastest first; what it rules out it
names."""

import pytest

from llama_mcore.config.checks import check_config
from llama_mcore.errors import ConfigError
from llama_mcore.plan.layout.efficiency import Efficiency
from llama_mcore.plan.layout.flops import token_flops
from llama_mcore.plan.layout.hardware import gpu
from llama_mcore.plan.layout.search import (
    MICRO_BATCHES,
    NEAR_BATCH,
    STAGES,
    TENSOR_PARALLEL,
    Cluster,
    Found,
    Goal,
    check_model,
    nothing_fits,
    search,
)
from llama_mcore.plan.layout.to_run import base_run
from tests.support.errors import refused

FOUR_M = 4 * 2**20
CASES = [
    ("65b", 2048, "a100-80gb"),
    ("33b", 1024, "a100-80gb"),
    ("13b", 96, "h200"),
    ("7b", 1, "h200"),
    ("llama3-8b", 24, "h100"),
    ("llama3-70b", 512, "b200"),
]


def cluster(kind: str, gpus: int, per_node: int = 8) -> Cluster:
    return Cluster(gpu(kind), gpus, gpu(kind).network, Efficiency(), per_node)


def goal(model: str, tokens: float = 1e12, batch_tokens: float = FOUR_M) -> Goal:
    run = base_run(model)
    return Goal(run, tokens, batch_tokens / run.model.seq_length)


def found(model: str, gpus: int, kind: str, per_node: int = 8) -> Found:
    return search(goal(model), cluster(kind, gpus, per_node))


def remedy(wanted: Goal, where: Cluster) -> str:
    result = search(wanted, where)
    assert not result.options
    error = nothing_fits(wanted, where, result.rejected)
    assert error.exit_code == 64
    return error.message()


@pytest.mark.parametrize(("model", "gpus", "kind"), CASES)
def test_every_offered_layout_runs_and_fits(model: str, gpus: int, kind: str) -> None:
    options = found(model, gpus, kind).options
    assert options
    for option in options:
        check_config(option.run, gpus)
        layout = option.layout
        assert layout["tp"] * layout["dp"] == gpus  # type: ignore[operator]
        assert layout["sequence_parallel"] == (option.run.parallel.tp > 1)
        assert option.footprint.total <= gpu(kind).memory_bytes


@pytest.mark.parametrize(("model", "gpus", "kind"), CASES)
def test_the_fastest_comes_first(model: str, gpus: int, kind: str) -> None:
    speeds = [option.tokens_per_s_per_gpu for option in found(model, gpus, kind).options]
    assert speeds == sorted(speeds, reverse=True)
    assert len(set(speeds)) > 1


def test_every_layout_is_offered_or_ruled_out() -> None:
    result = found("33b", 1024, "a100-80gb")
    all_layouts = len(TENSOR_PARALLEL) * len(STAGES) * len(MICRO_BATCHES) * 3
    assert len(result.options) + sum(result.rejected.values()) == all_layouts


def test_52_heads_do_not_divide_by_8() -> None:
    result = found("33b", 1024, "a100-80gb")
    reason = next(reason for reason in result.rejected if "num_attention_heads = 52" in reason)
    assert "tp = 8" in reason
    assert result.rejected[reason] > 0
    assert {option.run.parallel.tp for option in result.options} <= {1, 2, 4}


def test_tensor_parallelism_stays_within_a_node() -> None:
    result = found("7b", 64, "h100", per_node=4)
    assert max(option.run.parallel.tp for option in result.options) == 4
    (count,) = (count for reason, count in result.rejected.items() if "4 GPUs of a node" in reason)
    assert count == 2 * len(STAGES) * len(MICRO_BATCHES) * 3


@pytest.mark.parametrize("gpus", [96, 120, 448, 896, 960, 1784, 1856, 2048, 2400, 3096])
def test_a_batch_is_shared_evenly_and_near_what_was_wanted(gpus: int) -> None:
    options = search(goal("65b"), cluster("h100", gpus)).options
    assert options
    for option in options:
        batch = option.run.train.global_batch_size
        assert batch % (option.run.train.micro_batch_size * option.layout["dp"]) == 0  # type: ignore[operator]
        assert abs(batch - 2048) <= NEAR_BATCH * 2048


@pytest.mark.parametrize(("gpus", "batch"), [(64, 2048), (512, 2048), (4096, 2048)])
def test_powers_of_two_leave_the_batch_as_it_is(gpus: int, batch: int) -> None:
    best = search(goal("7b"), cluster("h100", gpus)).options[0]
    assert best.run.train.global_batch_size == batch


def test_steps_cover_the_tokens_and_warm_up_fits_them() -> None:
    train = found("7b", 64, "h100").options[0].run.train
    assert (train.steps - 1) * FOUR_M < 1e12 <= train.steps * FOUR_M
    short = search(goal("7b", tokens=10 * FOUR_M), cluster("h100", 64)).options[0].run
    assert short.optim.warmup_steps == short.train.steps == 10


def test_speed_changes_little_with_the_number_of_gpus() -> None:
    """Batches are chosen to fit: where one fits badly, speed falls for that reason alone."""
    counts = [*range(512, 1100, 8)]
    speeds = [
        search(goal("65b"), cluster("h100", gpus)).options[0].tokens_per_s_per_gpu for gpus in counts[::9]
    ]
    assert min(speeds) > 0.85 * max(speeds)


def test_figures_of_an_option_agree_with_each_other() -> None:
    best = found("65b", 2048, "a100-80gb").options[0]
    tokens = best.run.train.steps * best.run.tokens_per_step
    assert best.days * 86400 * 2048 * best.tokens_per_s_per_gpu == pytest.approx(tokens)
    assert best.gpu_hours == pytest.approx(best.days * 24 * 2048)
    assert best.mfu_causal < best.mfu_full
    # 380 tokens/s are 48.5 % (causal)
    assert best.mfu_causal / best.tokens_per_s_per_gpu == pytest.approx(0.485 / 380, rel=2e-3)


def test_full_recomputation_shows_in_the_hfu_alone() -> None:
    """A third more of all but the output layer; of attention half as much again (9 products for 6)."""
    options = found("7b", 64, "h100").options
    full = next(option for option in options if option.run.model.recompute == "full")
    counted, output_layer = token_flops(full.run.model), 6 * 32000 * 4096
    executed = counted.matmul + (counted.matmul - output_layer) / 3 + counted.causal_attention * 9 / 6
    assert full.hfu_causal / full.mfu_causal == pytest.approx(executed / counted.causal)
    rest = next(option for option in options if option.run.model.recompute != "full")
    executed = counted.matmul + counted.causal_attention * 7 / 6
    assert rest.hfu_causal / rest.mfu_causal == pytest.approx(executed / counted.causal)


def test_where_nothing_fits_the_smallest_change_is_named() -> None:
    wanted = goal("65b")
    said = remedy(wanted, cluster("a100-40gb", 8))
    assert "--gpus 32" in said
    assert "--gpu b200" in said
    assert "more than the 39 GiB" in said
    # it is the smallest: what it names fits, a node less does not
    assert search(wanted, cluster("a100-40gb", 32)).options
    assert not search(wanted, cluster("a100-40gb", 24)).options
    assert search(wanted, cluster("b200", 8)).options
    assert not search(wanted, cluster("h200", 8)).options


def test_more_gpus_need_not_be_twice_as_many() -> None:
    wanted = goal("65b")
    assert "--gpus 16" in remedy(wanted, cluster("h100", 14))
    assert search(wanted, cluster("h100", 16)).options


def test_a_batch_that_the_ranks_cannot_share_is_the_remedy() -> None:
    wanted = goal("7b", batch_tokens=2048)
    said = remedy(wanted, cluster("h100", 64))
    assert "--global-batch-tokens 16K" in said
    assert search(goal("7b", batch_tokens=16 * 1024), cluster("h100", 64)).options


def test_what_is_wrong_with_the_model_is_said_of_the_model() -> None:
    run = base_run("65b").model_copy(
        update={"model": base_run("65b").model.model_copy(update={"num_query_groups": 7})}
    )
    with refused(ConfigError, "model.num_query_groups", 7, remedy=False):
        check_model(Goal(run, 1e12, 2048))
