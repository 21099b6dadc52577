"""GPUs and networks: their best speeds, with the source of every figure. Imports no torch.

A GPU that is not listed has no peak, and figures that need one are left out rather than guessed. To add a
GPU, add a record to GPUS.
"""

from dataclasses import dataclass

from llama_mcore.errors import ConfigError, Problem, nearest

GIB = 2**30


@dataclass(frozen=True)
class Network:
    """Links between nodes."""

    name: str
    bytes_per_gpu: float
    """Bytes per second that each GPU of a node sends while it receives as many, all at once."""


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


@dataclass(frozen=True)
class Peak:
    """Highest rate of bf16 matrix products."""

    bf16_flops: float
    """Dense bf16 operations per second; data sheets of Hopper print twice that, for sparse matrices."""
    source: str


@dataclass(frozen=True)
class Gpu:
    """One GPU of a node whose GPUs all reach each other over NVLink."""

    name: str
    aliases: tuple[str, ...]
    """Other names in use."""
    driver_name: str
    """Name that the driver gives it. A part of a GPU (MIG) has another, and so no peak."""
    peak: Peak
    best_gemm_flops: float
    """Rate of the fastest of all bf16 matrix products, operations per second."""
    gemm_source: str
    memory_bytes: int
    """Capacity that torch reports, rounded down: the driver keeps some of a data sheet's 80 GB."""
    memory_bandwidth: float
    """Bytes per second."""
    nvlink: float
    """Bytes per second that one GPU sends to the others of its node while it receives as many."""
    watts: float
    """Thermal design power: an upper bound of what it draws."""
    source: str
    """Data sheet of memory, its bandwidth, NVLink and power."""
    network: Network
    """Usual network of its nodes."""
    flash2_share: float
    """Share of the peak that FlashAttention 2 tends to with the sequence, forward and backward."""
    attention: str = "flash2"
    """Kernel of our own runs, a key of efficiency.ATTENTION_KERNELS."""
    calibration: str = ""
    """Calibration file beside this one that holds for our own runs; without one, the constants that were
    fitted to published runs."""


_A100 = Peak(312e12, "NVIDIA A100 data sheet: 312 TFLOP/s")
_H100_PCIE = Peak(756e12, "NVIDIA H100 architecture paper, PCIe: 756 TFLOP/s dense")

# stas00/ml-engineering, compute/accelerator: a search over shapes.
_MAMF = "stas00/ml-engineering, maximum achievable matmul FLOPS"
# flash-attention, assets/flash2_h100_fwd_bwd_benchmark.png (causal, head 128): 163, 221, 265, 294, 308, 328
# TFLOP/s at 512 to 16,384 tokens; within 4 % that is 0.335 * peak * s / (s + 500). On the A100 the same form
# with 0.62, an estimate within what the paper states for it: 50 to 73 % of the peak (Dao, 2023, 2307.08691).
_FLASH2_A100, _FLASH2_HOPPER = 0.62, 0.335

GPUS: dict[str, Gpu] = {
    found.name: found
    for found in (
        Gpu(
            name="a100-40gb",
            aliases=("a100-sxm-40gb",),
            driver_name="NVIDIA A100-SXM4-40GB",
            peak=_A100,
            best_gemm_flops=271.2e12,
            gemm_source=_MAMF,
            memory_bytes=39 * GIB,
            memory_bandwidth=1.555e12,
            nvlink=300e9,
            watts=400.0,
            source="NVIDIA data sheet, SXM",
            network=NETWORKS["ib-200x8"],
            flash2_share=_FLASH2_A100,
        ),
        Gpu(
            name="a100-80gb",
            aliases=("a100", "a100-sxm-80gb"),
            driver_name="NVIDIA A100-SXM4-80GB",
            peak=_A100,
            best_gemm_flops=271.2e12,
            gemm_source=_MAMF,
            memory_bytes=79 * GIB,
            memory_bandwidth=2.039e12,
            nvlink=300e9,
            watts=400.0,
            source="NVIDIA data sheet, SXM",
            network=NETWORKS["ib-200x8"],
            flash2_share=_FLASH2_A100,
        ),
        Gpu(
            name="h100",
            aliases=("h100-80gb", "h100-sxm", "h100-sxm-80gb"),
            driver_name="NVIDIA H100 80GB HBM3",
            peak=Peak(989.4e12, "NVIDIA H100 architecture paper, SXM5: 989.4 TFLOP/s dense"),
            best_gemm_flops=794.5e12,
            gemm_source=_MAMF,
            memory_bytes=79 * GIB,
            memory_bandwidth=3.35e12,
            nvlink=450e9,
            watts=700.0,
            source="NVIDIA data sheet, SXM",
            network=NETWORKS["ib-400x8"],
            flash2_share=_FLASH2_HOPPER,
            attention="cudnn",
            calibration="h200.json",
        ),
        Gpu(
            name="h200",
            aliases=("h200-sxm", "h200-141gb"),
            driver_name="NVIDIA H200",
            peak=Peak(989.4e12, "NVIDIA H200 data sheet, SXM: 1,979 TFLOP/s with sparsity, half of it dense"),
            best_gemm_flops=788e12,
            gemm_source="8192 x 8192 x 8192 on random data, measured",
            memory_bytes=139 * GIB,
            memory_bandwidth=4.8e12,
            nvlink=450e9,
            watts=700.0,
            source="NVIDIA data sheet, SXM",
            network=NETWORKS["ib-400x8"],
            flash2_share=_FLASH2_HOPPER,
            attention="cudnn",
            calibration="h200.json",
        ),
        Gpu(
            name="b200",
            aliases=("b200-sxm",),
            driver_name="NVIDIA B200",
            peak=Peak(2250e12, "NVIDIA DGX B200 data sheet: 36 PFLOP/s with sparsity on 8 GPUs, dense half"),
            best_gemm_flops=1745e12,
            gemm_source=_MAMF,
            memory_bytes=178 * GIB,
            memory_bandwidth=8.0e12,
            nvlink=900e9,
            watts=1000.0,
            source="DGX B200 data sheet",
            network=NETWORKS["ib-400x8"],
            flash2_share=_FLASH2_HOPPER,
        ),
    )
}
# A run on these reports its share of the peak; the planner knows no nodes whose links are PCIe alone.
_PCIE_PEAKS = {
    "NVIDIA A100-PCIE-40GB": _A100,
    "NVIDIA A100 80GB PCIe": _A100,
    "NVIDIA H100 PCIe": _H100_PCIE,
}
_BY_ALIAS = {alias: found for found in GPUS.values() for alias in found.aliases}
_BY_DRIVER = {found.driver_name: found for found in GPUS.values()}


def gpu_of_driver(device_name: str) -> Gpu | None:
    """GPU by the driver's name for it; None if it is not known."""
    return _BY_DRIVER.get(device_name)


def peak_of(device_name: str) -> Peak | None:
    """Peak of a GPU by the driver's name for it; None if it is not known."""
    found = _BY_DRIVER.get(device_name)
    return found.peak if found else _PCIE_PEAKS.get(device_name)


def gpu(name: str) -> Gpu:
    """GPU by name or alias. Raises ConfigError with the nearest name if there is none."""
    known = GPUS | _BY_ALIAS
    if (found := known.get(name.lower())) is None:
        raise ConfigError(Problem("--gpu", name, "is not known", nearest(name.lower(), GPUS, _BY_ALIAS)))
    return found


def network(name: str) -> Network:
    """Network by name. Raises ConfigError with the nearest name if there is none."""
    if (found := NETWORKS.get(name.lower())) is None:
        raise ConfigError(Problem("--network", name, "is not known", nearest(name.lower(), NETWORKS)))
    return found
