"""llama_mcore.plan.layout.throughput: the parts of a step against arithmetic done here."""

from dataclasses import replace

import pytest

from llama_mcore.model.config import PRESETS, ModelConfig
from llama_mcore.plan.layout.efficiency import Efficiency, gemm_flops
from llama_mcore.plan.layout.flops import token_flops
from llama_mcore.plan.layout.hardware import gpu, network
from llama_mcore.plan.layout.throughput import (
    Predictor,
    Shape,
    StepTime,
    Traffic,
    Work,
    own_traffic,
    rank_params,
)

MODEL = ModelConfig.model_validate(PRESETS["65b"])
SHAPE = Shape(MODEL)
GPU, NETWORK = gpu("a100-80gb"), network("ib-200x8")
# Hardware that reaches its best at once, whatever the shape: then parts are volumes over speeds.
IDEAL = Efficiency(
    gemm_share=1.0,
    gemm_half_side=0.0,
    stream_share=1.0,
    optimizer_share=1.0,
    nvlink_share=1.0,
    network_share=1.0,
    hop_s=0.0,
    overlap_cost=0.0,
    layer_gap_s=0.0,
)
WORK = Work(gpus=2048, tp=8, stage=2, micro_batch=8, micro_batches=1, recompute="selective")
TOKENS = 8 * 2048
P = rank_params(SHAPE, WORK)


def step(efficiency: Efficiency = IDEAL, **changes: object) -> StepTime:
    return Predictor(GPU, NETWORK, efficiency).step_time(SHAPE, replace(WORK, **changes))


def test_matrix_products_are_those_that_the_mfu_counts() -> None:
    assert step().gemm == pytest.approx(TOKENS * token_flops(MODEL).matmul / 8 / 271.2e12)


def test_attention_is_causal_and_its_backward_two_and_a_half_forwards() -> None:
    forward = TOKENS * token_flops(MODEL).causal_attention / 3 / 8
    speed = 0.62 * 312e12 * 2048 / (2048 + 500)
    assert step().attention == pytest.approx(3.5 * forward / speed)


def test_a_small_side_makes_a_product_slow() -> None:
    """Half as fast where its smallest side is that constant; on a GPU with more operations per byte the side
    is larger in proportion."""
    half = replace(IDEAL, gemm_half_side=1024.0)
    assert gemm_flops(GPU, half, 1024) == pytest.approx(271.2e12 / 2)
    side = 1024 * (989.4e12 / 3.35e12) / (312e12 / 2.039e12)
    assert gemm_flops(gpu("h100"), half, side) == pytest.approx(794.5e12 / 2)
    assert step(half).gemm > 1.2 * step().gemm


def test_zero_1_reduces_fp32_gradients_when_all_is_done() -> None:
    """The 33 GB of slurm/65b.sh over 25 GB/s, and bf16 weights back; nothing hides it."""
    assert pytest.approx(33e9, rel=0.02) == 4 * P
    expected = (4 * P + 2 * P) * 255 / 256 / 25e9
    assert step(stage=1).data_parallel == pytest.approx(expected)
    assert step(stage=1, micro_batch=1, micro_batches=8).data_parallel == pytest.approx(expected)


def test_zero_2_reduces_every_micro_batch_behind_the_backward() -> None:
    gather = 2 * P * 255 / 256 / 25e9
    assert step().data_parallel == pytest.approx(gather)
    cost = replace(IDEAL, overlap_cost=0.5)
    reduce = 4 * P * 255 / 256 / 25e9
    assert step(cost).data_parallel == pytest.approx(gather + 0.5 * reduce)
    # eight times the traffic, of which a small micro-batch hides less
    assert step(cost, micro_batch=1, micro_batches=8).data_parallel > gather + 8 * 0.5 * reduce


def test_zero_3_gathers_weights_twice() -> None:
    cost = replace(IDEAL, overlap_cost=0.5)
    transfers = (2 * 2 * P + 4 * P) * 255 / 256 / 25e9
    assert step(cost, stage=3, micro_batch=32).data_parallel == pytest.approx(0.5 * transfers)


def test_ranks_of_a_node_share_its_links() -> None:
    """Without tensor parallelism 8 times the bytes leave over 8 times the links."""
    alone, split = step(tp=1, stage=1, micro_batch=1), step(stage=1)
    assert alone.data_parallel == pytest.approx(split.data_parallel, rel=0.01)


def test_within_a_node_nvlink_carries_it() -> None:
    params = rank_params(SHAPE, replace(WORK, tp=1))
    assert step(gpus=8, tp=1, stage=1).data_parallel == pytest.approx((4 + 2) * params * 7 / 8 / 300e9)


def test_a_ring_pays_for_each_node() -> None:
    hops = step(replace(IDEAL, hop_s=1e-5), stage=1).data_parallel - step(stage=1).data_parallel
    buckets = -(-P // 200_000_000)
    assert hops == pytest.approx(2 * buckets * 255 * 1e-5)


def test_a_forward_waits_for_four_transfers_a_layer() -> None:
    one = 2 * TOKENS * 8192 * 7 / 8 / 300e9
    assert step(overlaps_backward_entry=False).tensor_parallel == pytest.approx(80 * 6 * one)
    full = step(overlaps_backward_entry=False, recompute="full")
    assert full.tensor_parallel == pytest.approx(80 * 10 * one)
    piecewise = step(overlaps_backward_entry=False, overlaps_forward=True)
    assert piecewise.tensor_parallel == pytest.approx(80 * 2 * one)
    assert step(tp=1).tensor_parallel == 0
    hidden = step(replace(IDEAL, overlap_cost=0.5), overlaps_backward_entry=False).tensor_parallel
    assert hidden == pytest.approx(80 * (6 + 0.5 * 4) * one)


def test_a_backward_begins_with_gathers_beside_what_is_computed_again() -> None:
    """They are longer than that: two norms, a rotation and a SwiGLU."""
    one = 2 * TOKENS * 8192 * 7 / 8 / 300e9
    again = 2 * TOKENS / 8 * (2 * 2 * 8192 + 2 * 2 * 8192 + 3 * 22016) / 2.039e12
    assert step().recompute == pytest.approx(80 * again)
    assert step().tensor_parallel == pytest.approx(80 * (6 * one - again))
    cost = step(replace(IDEAL, overlap_cost=0.5)).tensor_parallel - step().tensor_parallel
    assert cost == pytest.approx(80 * 0.5 * (4 * one + again))


def test_recomputing_costs_a_forward_of_the_layers_or_of_what_memory_bounds() -> None:
    full, selective, none = (step(recompute=policy) for policy in ("full", "selective", "none"))
    layers = token_flops(MODEL).matmul - 6 * 32000 * 8192
    assert none.recompute == 0
    assert selective.recompute < 0.1 * full.recompute
    residuals = 80 * 2 * 3 * 8192 * 2 * TOKENS / 8 / 2.039e12
    expected = TOKENS * layers / 3 / 8 / 271.2e12 + full.attention / 3.5 + selective.recompute + residuals
    assert full.recompute == pytest.approx(expected)


def test_a_kernel_for_each_operation_moves_more_than_one_for_all() -> None:
    """Values moved by a layer's norms, rotation and SwiGLU: 2 norms of 14 for 2, 21 for 2, 5 for 3."""
    fused, plain = step(), step(fused=False)
    local, tokens = TOKENS / 8, TOKENS / 8
    more = 2 * 12 * 8192 * local + 19 * 2 * 8192 * tokens + 2 * 22016 * tokens
    assert plain.memory_bound - fused.memory_bound == pytest.approx(3 * 80 * 2 * more / 2.039e12)


def test_the_optimizer_moves_34_bytes_a_parameter_it_owns() -> None:
    assert step(stage=1).optimizer == pytest.approx(34 * P / 256 / 2.039e12)


def test_a_pipeline_waits_while_it_fills() -> None:
    piped = step(gpus=2048, pp=8, stage=0, micro_batch=1, micro_batches=64)
    busy = piped.total - piped.bubble - piped.data_parallel - piped.optimizer
    assert piped.bubble == pytest.approx(busy * 7 / 64)
    interleaved = step(gpus=2048, pp=8, interleaved=5, stage=0, micro_batch=1, micro_batches=64)
    assert interleaved.bubble == pytest.approx(piped.bubble / 5)


def test_accumulation_repeats_all_but_the_optimizer_s_part() -> None:
    once, twice = step(), step(micro_batches=2)
    assert twice.gemm == pytest.approx(2 * once.gemm)
    assert twice.optimizer == once.optimizer


def test_traffic_of_a_system_costs_what_it_moves() -> None:
    """Bytes for each logit, each value of the output weight and chunk, each parameter and micro-batch; copies
    in widths of the heads."""
    logits, weight, memory = TOKENS * 32000 / 8, 32000 * 8192 / 8, 2.039e12
    plain = step().memory_bound
    wide = Traffic(logit=30)
    assert step(traffic=wide).memory_bound - plain == pytest.approx(logits * 2 / memory)
    chunked = Traffic(output_weight=10, loss_chunk=TOKENS / 3.5)
    assert step(traffic=chunked).memory_bound - plain == pytest.approx(weight * 10 * 4 / memory)
    copied = Traffic(copies=5)
    assert step(traffic=copied).memory_bound - plain == pytest.approx(80 * 5 * 2 * 8192 / 8 * TOKENS / memory)
    added = Traffic(accumulation=6)
    assert step(traffic=added, micro_batches=3).accumulation == pytest.approx(3 * 6 * P / memory)
    joined = Traffic(residual=1)
    fewer = 3 * 80 * 2 * 2 * 8192 * 2 * TOKENS / 8 / memory
    assert plain - step(traffic=joined).memory_bound == pytest.approx(fewer)


def test_traffic_of_our_own_runs() -> None:
    """Measured constants go with what is moved now, fitted ones with what they were fitted to."""
    assert own_traffic(GPU, MODEL, tp=1, stage=1) == Traffic()
    hopper = gpu("h200")
    assert [own_traffic(hopper, MODEL, 1, stage).accumulation for stage in (1, 2, 3)] == [6, 2, 6]
    # 512 MiB of fp32 logits, in whole tiles of 128 tokens
    assert own_traffic(hopper, MODEL, 1, 1).loss_chunk == 2**29 // (4 * 32000) // 128 * 128
    assert [own_traffic(hopper, MODEL, tp, 1).residual for tp in (1, 2)] == [1, 3]
