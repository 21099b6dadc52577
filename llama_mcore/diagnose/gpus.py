"""The devices that torch finds here, and what is wrong with them."""

import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from llama_mcore.diagnose.finding import Finding, Status
from llama_mcore.diagnose.smoke import Outcome
from llama_mcore.distributed.device import (
    DEVICE,
    choose_device,
    communication_backend,
    on_gpu,
    usable_gpus,
    why_no_gpu,
)
from llama_mcore.errors import PreflightError, shown

GROUP = "devices"
DRIVER = Path("/proc/driver/nvidia/version")
SMI = ("nvidia-smi", "--query-gpu=uuid,memory.free,compute_mode", "--format=csv,noheader,nounits")
SMI_LIMIT_S = 30.0
BF16 = (8, 0)
"""Ampere's compute capability, the first with bf16."""
CROWDED = 0.9
"""A GPU of which less is free is not the run's alone."""


@dataclass(frozen=True)
class Gpu:
    """What torch says of a GPU, and what nvidia-smi does, which needs no context on it."""

    index: int
    """Among those that this process sees."""
    name: str
    uuid: str
    capability: tuple[int, int]
    total: int
    """Bytes."""
    free: int | None = None
    """Bytes; None where nvidia-smi does not say."""
    mode: str = "Default"
    """Compute mode, in nvidia-smi's words."""


def devices(tested: Mapping[str, Outcome]) -> list[Finding]:
    """torch's build, the driver, and each GPU; problems where there are GPUs that a run cannot use.

    `tested`: the outcome of `smoke.gpu_tests`.
    """
    build = torch.version.cuda
    findings = [Finding(GROUP, "torch", "ok", f"built for CUDA {build}" if build else "built for the CPU")]
    driver = driver_version(DRIVER)
    if driver:
        findings.append(Finding(GROUP, "driver", "ok", driver))
    if on_gpu():
        return findings + [gpu_finding(gpu, tested[f"gpu {gpu.index}"]) for gpu in _gpus()]
    in_hardware = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return [*findings, _no_gpu(bool(driver)), bf16_on_cpu(in_hardware)]


def gpu_finding(gpu: Gpu, tested: Outcome) -> Finding:
    """`tested`: whether it takes work."""
    free = "" if gpu.free is None else f"{_gib(gpu.free)} of "
    capability = "{}.{}".format(*gpu.capability)
    value = f"{gpu.name}, {free}{_gib(gpu.total)} GiB{' free' * bool(free)}, compute capability {capability}"
    status, meaning, remedy = _fault(gpu, tested)
    required = gpu.mode == "Prohibited" or not tested.passed
    return Finding(GROUP, f"GPU {gpu.index}", status, f"{value}, UUID {gpu.uuid}", meaning, remedy, required)


def _fault(gpu: Gpu, tested: Outcome) -> tuple[Status, str, str]:
    """Status, meaning and remedy; the worst that is wrong."""
    share_it = f"as root: nvidia-smi -i GPU-{gpu.uuid} -c DEFAULT"
    if gpu.mode == "Prohibited":
        return "problem", "its compute mode lets no process use it (Prohibited)", share_it
    if not tested.passed:
        return "problem", tested.said, tested.remedy or "look at nvidia-smi and dmesg"
    if gpu.capability < BF16:
        meaning = "has no bf16, which train.precision is by default: that takes compute capability 8.0"
        return "problem", meaning, "train.precision=fp32, or a newer GPU"
    if gpu.free is not None and gpu.free < CROWDED * gpu.total:
        return "note", "others use the rest, which a run may need", "nvidia-smi shows who"
    if gpu.mode != "Default":
        return (
            "note",
            f"one process has it alone at a time ({gpu.mode}): no other can while a run does",
            share_it,
        )
    return "ok", "", ""


def _gpus() -> list[Gpu]:
    seen = by_smi(_ask_smi())
    gpus = []
    for index in range(usable_gpus()):
        found = torch.cuda.get_device_properties(index)
        uuid = str(found.uuid)
        free, mode = seen.get(uuid, (None, "Default"))
        gpus.append(Gpu(index, found.name, uuid, (found.major, found.minor), found.total_memory, free, mode))
    return gpus


def _ask_smi() -> str:
    with suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(SMI, capture_output=True, text=True, timeout=SMI_LIMIT_S).stdout
    return ""


def by_smi(text: str) -> dict[str, tuple[int | None, str]]:
    """UUID -> free bytes and compute mode, of what SMI prints. Some GPUs, and all parts of one that is shared
    out (MIG), have no such number."""
    found: dict[str, tuple[int | None, str]] = {}
    for line in text.splitlines():
        uuid, *rest = [field.strip() for field in line.split(",")]
        if len(rest) == 2:
            found[uuid.removeprefix("GPU-")] = (int(rest[0]) << 20 if rest[0].isdigit() else None, rest[1])
    return found


def _no_gpu(driver: bool) -> Finding:
    """What becomes of a run; of one that would end, what its first message would be."""
    try:
        choose_device()
    except PreflightError as error:
        (problem,) = error.problems
        return Finding(GROUP, "GPU", "problem", "none", problem.reason, problem.remedy, required=True)
    if torch.cuda.is_available():
        meaning = "this machine's GPUs are left alone: everything goes on the CPU"
        return Finding(GROUP, "GPU", "note", f"none: {DEVICE}=cpu", meaning, f"unset {DEVICE} to use them")
    there = driver or shutil.which("nvidia-smi") is not None
    return no_gpu_finding(torch.version.cuda, there, os.environ.get("CUDA_VISIBLE_DEVICES"), *why_no_gpu())


def no_gpu_finding(build: str | None, driver: bool, visible: str | None, reason: str, remedy: str) -> Finding:
    """A problem where somebody wanted GPUs: has installed torch for them, or NVIDIA's driver, and hides none.

    `build`: the CUDA that torch was built for; `visible`: CUDA_VISIBLE_DEVICES.
    """
    value = f"none: CPU, {communication_backend()}"
    if build is None and not driver:
        return Finding(GROUP, "GPU", "note", value, reason)
    meaning = f"a run goes on the CPU: {shown(reason)}"
    if visible is not None and build is not None:
        return Finding(GROUP, "GPU", "note", value, meaning, remedy)
    return Finding(GROUP, "GPU", "problem", value, meaning, f"{remedy}; on a CPU node ignore it")


def bf16_on_cpu(in_hardware: bool) -> Finding:
    """Without AVX-512 or the like a matrix product was seen to take a hundred times as long as in fp32."""
    if in_hardware:
        return Finding(GROUP, "bf16 on the CPU", "ok", "in hardware")
    meaning = "this CPU has no instructions for bf16, in which products take far longer than in fp32"
    remedy = "train.precision=fp32 for runs on it"
    return Finding(GROUP, "bf16 on the CPU", "note", "in software", meaning, remedy)


def loopback_ranks() -> int:
    """Ranks of the collective check: NCCL takes one for each GPU."""
    return min(2, usable_gpus()) if on_gpu() else 2


def driver_version(path: Path) -> str:
    """NVIDIA's kernel driver by its own file; empty where there is none."""
    found = re.search(r"Kernel Module(?: for \S+)?\s+([\d.]+)", path.read_text()) if path.is_file() else None
    return found.group(1) if found else ""


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f}"
