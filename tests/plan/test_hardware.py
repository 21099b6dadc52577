"""llama_mcore.plan.hardware: every figure has a source, every name is known or answered with the nearest."""

import pytest

from llama_mcore.errors import ConfigError
from llama_mcore.plan.hardware import (
    ALIASES,
    DEFAULT_NETWORK,
    GPUS,
    NETWORKS,
    gpu,
    gpu_of_driver,
    network,
    peak_of,
)


@pytest.mark.parametrize("name", [*GPUS, *ALIASES, "A100-80GB"])
def test_a_known_gpu(name: str) -> None:
    found = gpu(name)
    assert found.name in GPUS
    assert found.peak.source
    assert found.gemm_source
    assert found.source
    # no matrix product beats the peak, and none of these GPUs reaches less than three quarters of it
    assert 0.75 < found.best_gemm_flops / found.peak.bf16_flops < 1


def test_aliases_and_default_networks_lead_somewhere() -> None:
    assert set(ALIASES.values()) <= set(GPUS)
    assert set(DEFAULT_NETWORK) == set(GPUS)
    assert set(DEFAULT_NETWORK.values()) <= set(NETWORKS)


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
    ("name", "nearest"), [("h10", "h100"), ("a100-80", "a100-80gb"), ("tpu-v4", "known: a100-40gb")]
)
def test_an_unknown_gpu(name: str, nearest: str) -> None:
    with pytest.raises(ConfigError, match=nearest):
        gpu(name)


def test_an_unknown_network() -> None:
    with pytest.raises(ConfigError, match="did you mean ib-200x8"):
        network("ib-200x9")


def test_eight_links_of_200_gbit_give_each_gpu_25_gb_a_second() -> None:
    assert network("ib-200x8").bytes_per_gpu == 25e9
    assert network("ethernet-100").bytes_per_gpu == 12.5e9 / 8
