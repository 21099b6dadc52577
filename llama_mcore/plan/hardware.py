"""Peak speeds of known GPUs, each with its source. Pure Python.

A GPU that is not listed has no peak, and what depends on one is not reported rather than guessed.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Peak:
    bf16_flops: float
    """Dense bf16 operations per second; data sheets of Hopper print twice that, for sparse matrices."""
    source: str


_A100 = Peak(312e12, "NVIDIA A100 data sheet: 312 TFLOP/s")
_H100_SXM = Peak(989.4e12, "NVIDIA H100 architecture paper, SXM5: 989.4 TFLOP/s dense")
_H100_PCIE = Peak(756e12, "NVIDIA H100 architecture paper, PCIe: 756 TFLOP/s dense")
_H200 = Peak(989.4e12, "NVIDIA H200 data sheet, SXM: 1,979 TFLOP/s with sparsity, half of it dense")

# Keys are the names that the driver gives. A part of a GPU (MIG) has another name, and so no peak.
_PEAKS = {
    "NVIDIA A100-PCIE-40GB": _A100,
    "NVIDIA A100 80GB PCIe": _A100,
    "NVIDIA A100-SXM4-40GB": _A100,
    "NVIDIA A100-SXM4-80GB": _A100,
    "NVIDIA H100 PCIe": _H100_PCIE,
    "NVIDIA H100 80GB HBM3": _H100_SXM,
    "NVIDIA H200": _H200,
}


def peak_of(device_name: str) -> Peak | None:
    """The peak of a GPU by the driver's name for it; None if it is not known."""
    return _PEAKS.get(device_name)
