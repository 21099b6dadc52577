"""llama_mcore.diagnose.gpus: what it makes of what torch and nvidia-smi say, and of machines
without a GPU."""

from dataclasses import replace

import pytest
import torch

from llama_mcore.diagnose import gpus
from llama_mcore.diagnose.gpus import Gpu, by_smi, devices, driver_version, gpu_finding, no_gpu_finding
from llama_mcore.diagnose.smoke import Outcome
from llama_mcore.errors import PreflightError, Problem

GIB = 1 << 30
WORKS = Outcome(True, "takes work")
HOPPER = Gpu(0, "NVIDIA H100", "8a1c", (9, 0), 80 * GIB, 79 * GIB)


def test_a_gpu_that_is_free_is_described() -> None:
    found = gpu_finding(HOPPER, WORKS)
    assert (found.name, found.status) == ("GPU 0", "ok")
    assert found.value == "NVIDIA H100, 79.0 of 80.0 GiB free, compute capability 9.0, UUID 8a1c"
    assert "80.0 GiB" in gpu_finding(replace(HOPPER, free=None), WORKS).value


@pytest.mark.parametrize(
    ("gpu", "tested", "status", "stops", "meaning", "remedy"),
    [
        (replace(HOPPER, free=70 * GIB), WORKS, "note", False, "other processes", "nvidia-smi"),
        (replace(HOPPER, mode="Exclusive_Process"), WORKS, "note", False, "Exclusive_Process", "-c DEFAULT"),
        (replace(HOPPER, mode="Prohibited"), WORKS, "problem", True, "Prohibited", "-i GPU-8a1c -c DEFAULT"),
        (replace(HOPPER, capability=(7, 5)), WORKS, "problem", False, "bf16", "train.precision=fp32"),
        (HOPPER, Outcome(False, "has no memory left", "end that"), "problem", True, "no memory", "end that"),
        (HOPPER, Outcome(False, "ended its process (SIGSEGV)"), "problem", True, "SIGSEGV", "nvidia-smi"),
    ],
)
def test_what_is_wrong_with_a_gpu(
    gpu: Gpu, tested: Outcome, status: str, stops: bool, meaning: str, remedy: str
) -> None:
    found = gpu_finding(gpu, tested)
    assert (found.status, found.stops_training) == (status, stops)
    assert meaning in found.meaning
    assert remedy in found.remedy


def test_the_lowest_capability_with_bf16_is_enough() -> None:
    assert gpu_finding(replace(HOPPER, capability=(8, 0)), WORKS).status == "ok"


def test_what_nvidia_smi_prints_is_read() -> None:
    text = "GPU-8a1c, 81079, Default\nGPU-77, [N/A], Exclusive_Process\n\nNo devices were found\n"
    assert by_smi(text) == {"8a1c": (81079 << 20, "Default"), "77": (None, "Exclusive_Process")}


@pytest.mark.parametrize(
    ("build", "driver", "visible", "status"),
    [
        (None, False, None, "note"),
        (None, False, "", "note"),
        (None, True, None, "problem"),
        (None, True, "", "problem"),
        ("13.0", True, None, "problem"),
        ("13.0", False, None, "problem"),
        ("13.0", True, "", "note"),
    ],
)
def test_a_machine_without_a_gpu_for_torch(
    build: str | None, driver: bool, visible: str | None, status: str
) -> None:
    """A torch for the CPU cannot use a GPU however many are shown to it."""
    found = no_gpu_finding(build, driver, visible, "the reason", "the remedy")
    assert (found.status, found.stops_training) == (status, False)
    assert "the reason" in found.meaning
    assert (build is None and not driver) != ("the remedy" in found.remedy)


def test_a_machine_without_a_gpu_is_asked(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(gpus, "DRIVER", tmp_path / "none")
    monkeypatch.setattr(gpus.shutil, "which", lambda _: None)
    monkeypatch.setattr(torch.version, "cuda", None)
    found = devices({})
    assert [(one.name, one.required) for one in found] == [
        ("torch", False),
        ("GPU", False),
        ("bf16 on the CPU", False),
    ]
    assert "torch is built for the CPU" in found[1].meaning


def test_what_would_end_a_run_ends_the_doctor(monkeypatch) -> None:
    """A driver that is too old for torch must not lead to a run on the CPU beside the GPUs."""

    def refuse() -> None:
        raise PreflightError(Problem("run.device", "auto", "the driver is too old", "update it"))

    monkeypatch.setattr(gpus, "choose_device", refuse)
    gpu = {one.name: one for one in devices({})}["GPU"]
    assert gpu.stops_training
    assert (gpu.meaning, gpu.remedy) == ("the driver is too old", "update it")


def test_gpus_that_are_left_alone_are_said(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    gpu = {one.name: one for one in devices({})}["GPU"]
    assert (gpu.status, gpu.remedy) == ("note", "unset LLAMA_MCORE_DEVICE to use them")


def test_the_driver_names_itself(tmp_path) -> None:
    (tmp_path / "version").write_text(
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.124.06  Wed Feb 26\nGCC version: 12\n"
    )
    assert driver_version(tmp_path / "version") == "570.124.06"
    (tmp_path / "open").write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build\n"
    )
    assert driver_version(tmp_path / "open") == "570.86.15"
    assert driver_version(tmp_path / "nowhere") == ""
