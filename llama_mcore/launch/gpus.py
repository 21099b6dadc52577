"""The devices that torch finds here."""

import re
import shutil
from pathlib import Path

import torch

from llama_mcore.launch.finding import Finding
from llama_mcore.parallel.device import DEVICE, communication_backend, on_gpu

DRIVER = Path("/proc/driver/nvidia/version")


def devices() -> list[Finding]:
    """torch's build, the driver, and each GPU; problems where there are GPUs that torch cannot use."""
    build = torch.version.cuda
    findings = [
        Finding("devices", "torch", "ok", f"built for CUDA {build}" if build else "built for the CPU")
    ]
    driver = driver_version(DRIVER)
    if driver:
        findings.append(Finding("devices", "driver", "ok", driver))
    if on_gpu():
        return findings + [_gpu(index) for index in range(torch.cuda.device_count())]
    if torch.cuda.is_available():
        meaning = "this machine's GPUs are left alone: everything goes on the CPU"
        remedy = f"unset {DEVICE} to use them"
        return [*findings, Finding("devices", "GPU", "note", f"none: {DEVICE}=cpu", meaning, remedy)]
    if build is None and (driver or shutil.which("nvidia-smi")):
        meaning = "this machine has NVIDIA's driver, and torch cannot use it: a run goes on the CPU"
        remedy = "install torch's build for CUDA"
        return [*findings, Finding("devices", "GPU", "problem", "none for torch", meaning, remedy)]
    if build is not None:
        meaning = "torch is built for GPUs and sees none: a run goes on the CPU"
        remedy = (
            "look at nvidia-smi, CUDA_VISIBLE_DEVICES and what the job was given; or ignore it on a CPU node"
        )
        return [*findings, Finding("devices", "GPU", "problem", "none: CPU, gloo", meaning, remedy)]
    findings.append(Finding("devices", "GPU", "note", f"none: CPU, {communication_backend()}"))
    return [*findings, bf16_on_cpu(torch.ops.mkldnn._is_mkldnn_bf16_supported())]


def bf16_on_cpu(in_hardware: bool) -> Finding:
    """Without AVX-512 or the like a matrix product was seen to take a hundred times as long as in fp32."""
    if in_hardware:
        return Finding("devices", "bf16 on the CPU", "ok", "in hardware")
    meaning = "this CPU has no instructions for bf16, in which products take far longer than in fp32"
    remedy = "train.precision=fp32 for runs on it"
    return Finding("devices", "bf16 on the CPU", "note", "in software", meaning, remedy)


def loopback_ranks() -> int:
    """Ranks of the collective check: NCCL takes one for each GPU."""
    return min(2, torch.cuda.device_count()) if on_gpu() else 2


def driver_version(path: Path) -> str:
    """NVIDIA's kernel driver by its own file; empty where there is none."""
    found = re.search(r"Kernel Module(?: for \S+)?\s+([\d.]+)", path.read_text()) if path.is_file() else None
    return found.group(1) if found else ""


def _gpu(index: int) -> Finding:
    properties = torch.cuda.get_device_properties(index)
    size = f"{properties.total_memory / 2**30:.1f} GiB"
    capability = f"compute capability {properties.major}.{properties.minor}"
    return Finding("devices", f"GPU {index}", "ok", f"{properties.name}, {size}, {capability}")
