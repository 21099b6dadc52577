"""Communication beside computation, in traces of a step of two ranks: the gathers and reduce-scatters of
sequence parallelism, and ZeRO 2's reduction of gradients.

On two GPUs kernels of NCCL must run while matrix products do. The CPU has no streams: there a reduction must
begin before the backward's last matrix product, which it could run beside.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from llama_mcore.config.schema import RunConfig
from llama_mcore.observe.profile import Span, kernels, spans, together_us
from tests.gpu import traces
from tests.gpu.conftest import Place
from tests.support.models import PLAIN, Shape, run_config

pytestmark = [pytest.mark.process, pytest.mark.xdist_group("gpu")]

WIDE: Shape = {
    "num_layers": 4,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "ffn_hidden_size": 11008,
    "vocab_size": 4096,
    "seq_length": 2048,
}
"""Layers of the 7B: products long enough to hide a transfer."""


def is_product(kernel: Span) -> bool:
    """True for a matrix product of cuBLAS or CUTLASS; attention's kernels have such words too."""
    name = kernel.name.lower()
    return any(word in name for word in ("gemm", "nvjet", "xmma")) and not kernel.communicates


def beside_products(trace: dict[str, Any], kind: str) -> float:
    """Share of NCCL's time in this kind of collective in which matrix products run."""
    found = kernels(trace)
    moving = [each for each in found if each.communicates and kind in each.name]
    assert moving, f"no {kind} in {sorted({each.name for each in found if each.communicates})}"
    return together_us(moving, filter(is_product, found)) / sum(each.us for each in moving)


def kernel(name: str, stream: int, start: float, end: float) -> dict[str, Any]:
    times = {"ts": start, "dur": end - start}
    return {"ph": "X", "cat": "kernel", "name": name, "pid": 0, "tid": stream, **times}


MADE_UP = {
    "traceEvents": [
        kernel("nvjet_tst_256x128_64x4_2x1_v_bz_coopA_TNT", 7, 0, 100),
        kernel("void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16>", 7, 150, 200),
        kernel("void pytorch_flash::flash_fwd_kernel<cutlass::bfloat16_t>", 7, 200, 300),
        kernel("ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)", 20, 90, 130),
        kernel("ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)", 20, 140, 160),
        kernel(
            "ncclDevKernel_ReduceScatter_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)", 20, 210, 220
        ),
    ]
}


def test_the_share_beside_products_is_that_of_a_made_up_trace() -> None:
    """10 of 40 and 10 of 20 us; none beside attention."""
    assert beside_products(MADE_UP, "AllGather") == pytest.approx(20 / 60)
    assert beside_products(MADE_UP, "ReduceScatter") == 0
    with pytest.raises(AssertionError, match="no AllReduce in"):
        beside_products(MADE_UP, "AllReduce")


def zero_2(folder: Path, shape: Shape, bucket: int) -> RunConfig:
    """Two data-parallel ranks, whose gradients fill several buckets."""
    file = json.loads((Path(__file__).parents[2] / "ds_configs" / "zero2.json").read_text())
    file["zero_optimization"]["reduce_bucket_size"] = bucket
    path = folder / "zero2.json"
    path.write_text(json.dumps(file))
    return run_config(
        folder,
        shape,
        zero={"stage": 2, "config": str(path)},
        train={"precision": "bf16", "micro_batch_size": 2, "global_batch_size": 4},
    )


@pytest.mark.gpu
@pytest.mark.parametrize("place", ["gpu"], indirect=True)
def test_gathers_and_scatters_run_beside_products(place: Place, tmp_path: Path, record_property: Any) -> None:
    run = run_config(
        tmp_path,
        WIDE,
        parallel={"tp": 2, "sequence_parallel": True},
        train={"precision": "bf16", "micro_batch_size": 2, "global_batch_size": 2},
    )
    trace = place.run(2, traces.traced, run)
    for kind in ("AllGather", "ReduceScatter"):
        share = beside_products(trace, kind)
        record_property(f"{kind} beside products", f"{share:.0%}")
        assert share > 0


@pytest.mark.gpu
@pytest.mark.parametrize("place", ["gpu"], indirect=True)
def test_reduction_of_gradients_runs_beside_products(
    place: Place, tmp_path: Path, record_property: Any
) -> None:
    trace = place.run(2, traces.traced, zero_2(tmp_path, WIDE, 100_000_000))
    share = beside_products(trace, "Reduce")
    record_property("ZeRO 2's reduction beside products", f"{share:.0%}")
    assert share > 0


@pytest.mark.parametrize(("bucket", "begins_before"), [(5_000, True), (10**9, False)])
@pytest.mark.parametrize("place", ["cpu"], indirect=True)
def test_reduction_of_gradients_begins_while_the_backward_goes_on(
    place: Place, tmp_path: Path, bucket: int, begins_before: bool
) -> None:
    """With buckets that a layer fills. One that nothing fills is reduced when all gradients are there."""
    trace = place.run(2, traces.traced, zero_2(tmp_path, PLAIN, bucket))
    found = spans(trace, ("cpu_op",))
    last_product = max(each.start_us for each in found if each.name == "aten::mm")
    reductions = [each.start_us for each in found if each.name in ("c10d::reduce_", "c10d::allreduce_")]
    large = [start for start in reductions if start < last_product]
    assert bool(large) == begins_before, sorted({each.name for each in found if "c10d" in each.name})
