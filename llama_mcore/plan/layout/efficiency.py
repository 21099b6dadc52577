"""Efficiency of training against the hardware's best: one set of constants for all systems and sizes.

`llama-mcore plan validate --fit` fits those marked "fitted" to one half of the published runs in
plan/layout/published.py; the other half is held out. A calibration file replaces any of them. Imports no
torch.
"""

import json
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from llama_mcore.errors import ConfigError, Problem
from llama_mcore.plan.layout.hardware import Gpu


@dataclass(frozen=True)
class Efficiency:
    """Constants of the prediction; shares are between 0 and 1."""

    gemm_share: float = 0.845
    """Fitted. Share of a GPU's best matrix product that the largest ones reach between other kernels."""
    gemm_half_side: float = 44.4
    """Fitted. Smallest side of a product at which it reaches half of that, on an A100; in proportion to
    operations per byte of memory on others, as the same side feeds their units for a shorter time."""
    stream_share: float = 0.75
    """Share of memory bandwidth in norms, rotations, SwiGLU, residual sums and loss. NVIDIA
    cudnn-frontend, benchmark/norms: fused norms move 3.5 to 3.8 of an H200's 4.8 TB/s."""
    optimizer_share: float = 0.75
    """The same of the optimizer's step, whose buffers are few and large."""
    nvlink_share: float = 0.77
    """Share of NVLink's bandwidth in collectives of a node. NVIDIA nccl-tests: 230 of an A100's 300 GB/s."""
    network_share: float = 0.90
    """Share of the network's bandwidth. calculon, systems/a100_80g.json."""
    hop_s: float = 14e-6
    """Seconds per hop from node to node; a ring has as many hops as nodes. NCCL, src/graph/tuning.cc: latency
    of a ring over the network under its protocol for large messages."""
    overlap_cost: float = 0.398
    """Fitted. Remaining cost of a transfer hidden behind computation, whose units and memory it uses."""
    layer_gap_s: float = 1e-3
    """Fitted. Seconds between the kernels of one layer, forward and backward of one micro-batch: a few
    microseconds before each of about 200."""


SMALLEST_SHARE, LARGEST_CONSTANT = 1e-3, 1e6
"""Bounds of a calibration, beyond any machine."""
ORIGIN = ("measured", "source")
"""Keys of a calibration file that say when and on what it was measured."""
FITTED = ("gemm_share", "gemm_half_side", "overlap_cost", "layer_gap_s")


@dataclass(frozen=True)
class AttentionKernel:
    """Speed of a causal kernel that skips masked scores, forward and backward together.

    Operations per second = share of the peak * s / (s + half_length).
    """

    share: float | None
    """Share of the peak; None: the GPU's own figure for FlashAttention 2."""
    half_length: int


# Measured on one H200 with torch 2.11.0+cu130, 2026-11-27, in TFLOP/s of forward and backward, which counts
# 2.5 forwards. cudnn: 475 and 382 at 2,048 tokens, 562 and 448 at 4,096, 618 and 519 at 8,192: together 404,
# 475, 544, within 3 % of this form (cudnn-frontend's own benchmark: 397, 502, 567). torch_flash: 24.3 ms in a
# step of 12 layers of the 7B, which are 237; its form is that of flash2.
ATTENTION_KERNELS = {
    "flash2": AttentionKernel(None, 500),
    "cudnn": AttentionKernel(0.62, 1070),
    "torch_flash": AttentionKernel(0.298, 500),
}


def attention_flops(gpu: Gpu, kernel: str, sequence: int) -> float:
    """Speed of attention, counting the operations that causal attention needs."""
    found = ATTENTION_KERNELS[kernel]
    share = found.share or gpu.flash2_share
    return share * gpu.peak.bf16_flops * sequence / (sequence + found.half_length)


def gemm_flops(gpu: Gpu, efficiency: Efficiency, smallest_side: float) -> float:
    """Speed of matrix products with this smallest side."""
    half = (
        efficiency.gemm_half_side * (gpu.peak.bf16_flops / gpu.memory_bandwidth) / _A100_OPERATIONS_PER_BYTE
    )
    return gpu.best_gemm_flops * efficiency.gemm_share * smallest_side / (smallest_side + half)


_A100_OPERATIONS_PER_BYTE = 312e12 / 2.039e12


def parse_efficiency(found: dict[str, Any]) -> Efficiency:
    """The defaults with these fields replaced. Raises ConfigError with all problems of the fields."""
    known = {field.name for field in fields(Efficiency)}
    constants = {key: value for key, value in found.items() if key not in ORIGIN}
    problems = []
    for key, value in constants.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if key not in known:
            reason, remedy = "is not known", f"known: {', '.join(sorted(known))}"
        elif key.endswith("_share") and not (number and SMALLEST_SHARE <= value <= 1):
            reason, remedy = f"must be a number from {SMALLEST_SHARE:g} to 1", ""
        elif not (number and 0 <= value <= LARGEST_CONSTANT):
            reason, remedy = f"must be a number from 0 to {LARGEST_CONSTANT:g}", ""
        else:
            continue
        problems.append(Problem(f"--calibration: {key}", value, reason, remedy))
    if problems:
        raise ConfigError(problems)
    return replace(Efficiency(), **constants)


def dump_efficiency(efficiency: Efficiency) -> str:
    """Content of a calibration file, as parse_efficiency reads it."""
    return json.dumps(asdict(efficiency), indent=2) + "\n"
