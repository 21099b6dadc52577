"""llama_mcore.plan.layout.hardware: every figure has a source, every name is known or answered with the
nearest."""

import pytest

from llama_mcore.errors import ConfigError
from llama_mcore.plan.layout.hardware import (
    GPUS,
    NETWORKS,
    gpu,
    gpu_of_driver,
    network,
    peak_of,
)
from tests.support.errors import refused

ALIASES = [alias for found in GPUS.values() for alias in found.aliases]


@pytest.mark.parametrize("name", [*GPUS, *ALIASES, "A100-80GB"])
def test_a_known_gpu(name: str) -> None:
    found = gpu(name)
    assert found.name in GPUS
    assert found.peak.source
    assert found.gemm_source
    assert found.source
    # no matrix product beats the peak, and none of these GPUs reaches less than three quarters of it
    assert 0.75 < found.best_gemm_flops / found.peak.bf16_flops < 1


def test_each_name_is_that_of_one_gpu() -> None:
    names = [*GPUS, *ALIASES, *(found.driver_name for found in GPUS.values())]
    assert len(set(names)) == len(names)
    assert {found.network.name for found in GPUS.values()} <= set(NETWORKS)


@pytest.mark.parametrize(
    ("name", "flops"),
    [("a100-40gb", 312e12), ("a100-80gb", 312e12), ("h100", 989.4e12), ("h200", 989.4e12), ("b200", 2250e12)],
)
def test_peaks_are_those_of_the_data_sheets(name: str, flops: float) -> None:
    assert gpu(name).peak.bf16_flops == flops


def test_a_driver_s_name_leads_to_the_same_peak() -> None:
    for device in ("NVIDIA A100-SXM4-80GB", "NVIDIA H100 80GB HBM3", "NVIDIA H200"):
        found = gpu_of_driver(device)
        assert found is not None
        assert found.peak == peak_of(device)
    assert gpu_of_driver("Tesla T4") is None


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("h10", "did you mean h100?"),
        ("a100-80", "did you mean a100-80gb?"),
        ("tpu-v4", f"known: {', '.join(GPUS)}"),
    ],
)
def test_an_unknown_gpu(name: str, remedy: str) -> None:
    with refused(ConfigError, "--gpu", name) as caught:
        gpu(name)
    assert caught.value.problems[0].remedy == remedy


def test_an_unknown_network() -> None:
    with refused(ConfigError, "--network", "ib-200x9") as caught:
        network("ib-200x9")
    assert caught.value.problems[0].remedy == "did you mean ib-200x8?"


def test_eight_links_of_200_gbit_give_each_gpu_25_gb_a_second() -> None:
    assert network("ib-200x8").bytes_per_gpu == 25e9
    assert network("ethernet-100").bytes_per_gpu == 12.5e9 / 8
