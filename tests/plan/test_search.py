"""llama_mcore.plan.search: what it offers runs and fits, the fastest first; what it rules out it names."""

import pytest

from llama_mcore.config import check_run
from llama_mcore.plan.efficiency import Efficiency
from llama_mcore.plan.flops import token_flops
from llama_mcore.plan.hardware import DEFAULT_NETWORK, gpu, network
from llama_mcore.plan.layout_run import base_run
from llama_mcore.plan.search import Cluster, Found, nothing_fits, search, with_tokens

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
    return Cluster(gpu(kind), gpus, network(DEFAULT_NETWORK[kind]), Efficiency(), per_node)


def found(model: str, gpus: int, kind: str, per_node: int = 8) -> Found:
    where = cluster(kind, gpus, per_node)
    return search(with_tokens(base_run(model), 1e12, FOUR_M, where), where)


@pytest.mark.parametrize(("model", "gpus", "kind"), CASES)
def test_every_offered_layout_runs_and_fits(model: str, gpus: int, kind: str) -> None:
    options = found(model, gpus, kind).options
    assert options
    for option in options:
        check_run(option.run, gpus)
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
    """Tensor parallelism 1 to 16, 3 stages, 6 micro-batches, 3 policies."""
    result = found("33b", 1024, "a100-80gb")
    assert len(result.options) + sum(result.rejected.values()) == 5 * 3 * 6 * 3


def test_52_heads_do_not_divide_by_8() -> None:
    result = found("33b", 1024, "a100-80gb")
    reason = next(reason for reason in result.rejected if "num_attention_heads = 52" in reason)
    assert "tp = 8" in reason
    assert result.rejected[reason] == 3 * 6 * 3
    assert {option.run.parallel.tp for option in result.options} <= {1, 2, 4}


def test_tensor_parallelism_stays_within_a_node() -> None:
    result = found("7b", 64, "h100", per_node=4)
    assert max(option.run.parallel.tp for option in result.options) == 4
    assert result.rejected["tensor parallelism: tp must divide the 4 GPUs of a node"] == 2 * 3 * 6 * 3


def test_a_batch_is_shared_evenly() -> None:
    """2,048 sequences stay for a power of two; 96 GPUs get the nearest multiple of 192, within 5 %."""
    for gpus, batch in ((2048, 2048), (8, 2048), (96, 2112), (4096, 2048)):
        where = cluster("h100", gpus)
        assert with_tokens(base_run("7b"), 1e12, FOUR_M, where).train.global_batch_size == batch


def test_steps_cover_the_tokens_and_warm_up_fits_them() -> None:
    run = with_tokens(base_run("7b"), 1e12, FOUR_M, cluster("h100", 64))
    assert (run.train.steps - 1) * FOUR_M < 1e12 <= run.train.steps * FOUR_M
    short = with_tokens(base_run("7b"), 10 * FOUR_M, FOUR_M, cluster("h100", 64))
    assert short.optim.warmup_steps == short.train.steps == 10


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
    where = cluster("a100-40gb", 8)
    wanted = with_tokens(base_run("65b"), 1e12, FOUR_M, where)
    result = search(wanted, where)
    assert not result.options
    error = nothing_fits(wanted, where, result.rejected)
    assert error.exit_code == 64
    assert "--gpus 32" in error.message()
    assert "--gpu b200" in error.message()
    assert "more than the 40 GiB" in error.message()
    # it is the smallest: what it names fits, half of it does not
    assert search(wanted, cluster("a100-40gb", 32)).options
    assert not search(wanted, cluster("a100-40gb", 16)).options
    assert search(wanted, cluster("b200", 8)).options
    assert not search(wanted, cluster("h200", 8)).options
