"""What GPUs and networks can do at best, each figure with its source. Pure Python.

A GPU that is not listed has no peak, and what depends on one is not reported rather than guessed.
"""

from dataclasses import dataclass

from llama_mcore.errors import ConfigError, Problem, nearest

GIB = 2**30


@dataclass(frozen=True)
class Peak:
    bf16_flops: float
    """Dense bf16 operations per second; data sheets of Hopper print twice that, for sparse matrices."""
    source: str


@dataclass(frozen=True)
class Gpu:
    """One GPU of a node whose GPUs all reach each other."""

    name: str
    peak: Peak
    best_gemm_flops: float
    """What the fastest of all bf16 matrix products reaches, operations per second."""
    gemm_source: str
    memory_bytes: int
    """What torch names as its total capacity, rounded down: the driver keeps some of a data sheet's 80 GB."""
    memory_bandwidth: float
    """Bytes per second."""
    nvlink: float
    """Bytes per second that one GPU sends to the others of its node while it receives as many."""
    source: str
    """Of memory, its bandwidth and NVLink."""
    flash2_share: float
    """Share of the peak that FlashAttention 2 tends to with the sequence, forward and backward."""


@dataclass(frozen=True)
class Network:
    """Between nodes."""

    name: str
    bytes_per_gpu: float
    """Bytes per second that each GPU of a node sends while it receives as many, all at once."""


_A100 = Peak(312e12, "NVIDIA A100 data sheet: 312 TFLOP/s")
_H100_SXM = Peak(989.4e12, "NVIDIA H100 architecture paper, SXM5: 989.4 TFLOP/s dense")
_H100_PCIE = Peak(756e12, "NVIDIA H100 architecture paper, PCIe: 756 TFLOP/s dense")
_H200 = Peak(989.4e12, "NVIDIA H200 data sheet, SXM: 1,979 TFLOP/s with sparsity, half of it dense")
_B200 = Peak(2250e12, "NVIDIA DGX B200 data sheet: 36 PFLOP/s with sparsity on 8 GPUs, half of it dense")

# stas00/ml-engineering, compute/accelerator: a search over shapes ("MAMF"). H200: 8192 x 8192 x 8192 on
# random data, measured.
_MAMF = "stas00/ml-engineering, maximum achievable matmul FLOPS"
# flash-attention, assets/flash2_h100_fwd_bwd_benchmark.png (causal, head 128): 163, 221, 265, 294, 308, 328
# TFLOP/s at 512 to 16,384 tokens; within 4 % that is 0.335 * peak * s / (s + 500). On the A100 the same form
# with 0.62, an estimate within what the paper states for it: 50 to 73 % of the peak (Dao, 2023, 2307.08691).
_FLASH2_A100, _FLASH2_HOPPER = 0.62, 0.335

_SXM = "NVIDIA data sheet, SXM"
# fmt: off
GPUS: dict[str, Gpu] = {
    found.name: found
    for found in (
        Gpu("a100-40gb", _A100, 271.2e12, _MAMF, 39 * GIB, 1.555e12, 300e9, _SXM, _FLASH2_A100),
        Gpu("a100-80gb", _A100, 271.2e12, _MAMF, 79 * GIB, 2.039e12, 300e9, _SXM, _FLASH2_A100),
        Gpu("h100", _H100_SXM, 794.5e12, _MAMF, 79 * GIB, 3.35e12, 450e9, _SXM, _FLASH2_HOPPER),
        Gpu("h200", _H200, 788e12, "8192^3, measured", 139 * GIB, 4.8e12, 450e9, _SXM, _FLASH2_HOPPER),
        Gpu("b200", _B200, 1745e12, _MAMF, 178 * GIB, 8.0e12, 900e9, "DGX B200 data sheet", _FLASH2_HOPPER),
    )
}
# fmt: on
ALIASES = {
    "a100": "a100-80gb",
    "a100-sxm-40gb": "a100-40gb",
    "a100-sxm-80gb": "a100-80gb",
    "h100-80gb": "h100",
    "h100-sxm": "h100",
    "h100-sxm-80gb": "h100",
    "h200-sxm": "h200",
    "h200-141gb": "h200",
    "b200-sxm": "b200",
}

# Named by the link in Gbit/s and how many of them a node of 8 GPUs has.
NETWORKS: dict[str, Network] = {
    network.name: network
    for network in (
        Network("ethernet-100", 100e9 / 8 / 8),
        Network("ethernet-400", 400e9 / 8 / 8),
        Network("ib-200x4", 4 * 200e9 / 8 / 8),
        Network("ib-200x8", 200e9 / 8),
        Network("ib-400x8", 400e9 / 8),
        Network("ib-800x8", 800e9 / 8),
    )
}
DEFAULT_NETWORK = {
    "a100-40gb": "ib-200x8",
    "a100-80gb": "ib-200x8",
    "h100": "ib-400x8",
    "h200": "ib-400x8",
    "b200": "ib-400x8",
}

# Keys are the names that the driver gives. A part of a GPU (MIG) has another name, and so no peak.
_PEAKS = {
    "NVIDIA A100-PCIE-40GB": _A100,
    "NVIDIA A100 80GB PCIe": _A100,
    "NVIDIA A100-SXM4-40GB": _A100,
    "NVIDIA A100-SXM4-80GB": _A100,
    "NVIDIA H100 PCIe": _H100_PCIE,
    "NVIDIA H100 80GB HBM3": _H100_SXM,
    "NVIDIA H200": _H200,
    "NVIDIA B200": _B200,
}


_BY_DRIVER = {
    "NVIDIA A100-SXM4-40GB": "a100-40gb",
    "NVIDIA A100-SXM4-80GB": "a100-80gb",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
    "NVIDIA B200": "b200",
}


def gpu_of_driver(device_name: str) -> Gpu | None:
    """The GPU by the driver's name for it; None if it is not known."""
    return GPUS.get(_BY_DRIVER.get(device_name, ""))


def peak_of(device_name: str) -> Peak | None:
    """The peak of a GPU by the driver's name for it; None if it is not known."""
    return _PEAKS.get(device_name)


def gpu(name: str) -> Gpu:
    """The GPU of that name or alias. ConfigError with the nearest name if there is none."""
    key = name.lower()
    if (found := GPUS.get(ALIASES.get(key, key))) is None:
        raise ConfigError(Problem("--gpu", name, "is not known", nearest(key, GPUS, ALIASES)))
    return found


def network(name: str) -> Network:
    """The network of that name. ConfigError with the nearest name if there is none."""
    if (found := NETWORKS.get(name.lower())) is None:
        raise ConfigError(Problem("--network", name, "is not known", nearest(name.lower(), NETWORKS)))
    return found
