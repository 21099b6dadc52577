"""Devices that torch finds here, and problems with them."""

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
"""Share of a GPU's memory; where less is free, other processes use it."""


@dataclass(frozen=True)
class Gpu:
    """A GPU, as torch describes it, and nvidia-smi, which needs no context on it."""

    index: int
    """Index among the GPUs that this process sees."""
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
    """Findings on torch's build, the driver, and each GPU; problems where a run cannot use a GPU.

    `tested`: the outcomes of `backends.to_test`.
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
    """Finding on a GPU. `tested`: the outcome of its smoke test."""
    free = "" if gpu.free is None else f"{_gib(gpu.free)} of "
    capability = "{}.{}".format(*gpu.capability)
    value = f"{gpu.name}, {free}{_gib(gpu.total)} GiB{' free' * bool(free)}, compute capability {capability}"
    status, meaning, remedy = _fault(gpu, tested)
    required = gpu.mode == "Prohibited" or not tested.passed
    return Finding(GROUP, f"GPU {gpu.index}", status, f"{value}, UUID {gpu.uuid}", meaning, remedy, required)


def _fault(gpu: Gpu, tested: Outcome) -> tuple[Status, str, str]:
    """Status, meaning and remedy of the worst fault."""
    share_it = f"as root: nvidia-smi -i GPU-{gpu.uuid} -c DEFAULT"
    if gpu.mode == "Prohibited":
        return "problem", "its compute mode lets no process use it (Prohibited)", share_it
    if not tested.passed:
        return "problem", tested.text, tested.remedy or "check nvidia-smi and dmesg"
    if gpu.capability < BF16:
        meaning = "does not support bf16, the default of train.precision, which needs compute capability 8.0"
        return "problem", meaning, "set train.precision=fp32, or use a newer GPU"
    if gpu.free is not None and gpu.free < CROWDED * gpu.total:
        return "note", "other processes use the rest, which a run may need", "nvidia-smi lists them"
    if gpu.mode != "Default":
        return "note", f"only one process can use it at a time ({gpu.mode})", share_it
    return "ok", "", ""


def _gpus() -> list[Gpu]:
    seen = by_smi(_smi_output())
    gpus = []
    for index in range(usable_gpus()):
        found = torch.cuda.get_device_properties(index)
        uuid = str(found.uuid)
        free, mode = seen.get(uuid, (None, "Default"))
        gpus.append(Gpu(index, found.name, uuid, (found.major, found.minor), found.total_memory, free, mode))
    return gpus


def _smi_output() -> str:
    with suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(SMI, capture_output=True, text=True, timeout=SMI_LIMIT_S).stdout
    return ""


def by_smi(text: str) -> dict[str, tuple[int | None, str]]:
    """Free bytes and compute mode by UUID, from the output of SMI. Some GPUs, and all parts of a GPU that is
    divided (MIG), have no number of free bytes."""
    found: dict[str, tuple[int | None, str]] = {}
    for line in text.splitlines():
        uuid, *rest = [field.strip() for field in line.split(",")]
        if len(rest) == 2:
            found[uuid.removeprefix("GPU-")] = (int(rest[0]) << 20 if rest[0].isdigit() else None, rest[1])
    return found


def _no_gpu(driver: bool) -> Finding:
    """Finding on a machine without a usable GPU: the error that a run would end with, or where it would
    run."""
    try:
        choose_device()
    except PreflightError as error:
        (problem,) = error.problems
        return Finding(GROUP, "GPU", "problem", "none", problem.reason, problem.remedy, required=True)
    if torch.cuda.is_available():
        meaning = "this machine's GPUs are not used: everything runs on the CPU"
        return Finding(GROUP, "GPU", "note", f"none: {DEVICE}=cpu", meaning, f"unset {DEVICE} to use them")
    there = driver or shutil.which("nvidia-smi") is not None
    return no_gpu_finding(torch.version.cuda, there, os.environ.get("CUDA_VISIBLE_DEVICES"), *why_no_gpu())


def no_gpu_finding(build: str | None, driver: bool, visible: str | None, reason: str, remedy: str) -> Finding:
    """Problem where GPUs were meant to be used (torch's build for CUDA or a driver is installed, and no GPU
    is hidden), else a note.

    `build`: the CUDA that torch was built for; `visible`: CUDA_VISIBLE_DEVICES.
    """
    value = f"none: CPU, {communication_backend()}"
    if build is None and not driver:
        return Finding(GROUP, "GPU", "note", value, reason)
    meaning = f"a run uses the CPU: {shown(reason)}"
    if visible is not None and build is not None:
        return Finding(GROUP, "GPU", "note", value, meaning, remedy)
    return Finding(GROUP, "GPU", "problem", value, meaning, f"{remedy}; ignore this on a CPU node")


def bf16_on_cpu(in_hardware: bool) -> Finding:
    """Finding on the CPU's bf16: in software a matrix product was seen to take a hundred times as long."""
    if in_hardware:
        return Finding(GROUP, "bf16 on the CPU", "ok", "in hardware")
    meaning = "this CPU has no instructions for bf16, so that products take far longer than in fp32"
    remedy = "set train.precision=fp32 for runs on it"
    return Finding(GROUP, "bf16 on the CPU", "note", "in software", meaning, remedy)


def loopback_ranks() -> int:
    """Ranks of the loopback check: NCCL takes one for each GPU."""
    return min(2, usable_gpus()) if on_gpu() else 2


def driver_version(path: Path) -> str:
    """Version of NVIDIA's kernel driver by its own file; "" where there is none."""
    found = re.search(r"Kernel Module(?: for \S+)?\s+([\d.]+)", path.read_text()) if path.is_file() else None
    return found.group(1) if found else ""


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f}"
