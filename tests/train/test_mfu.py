"""llama_mcore.train.mfu: the MFU that a step reports."""

import pytest

from llama_mcore.config.load import load_config
from llama_mcore.distributed.device import device_name
from llama_mcore.train.mfu import step_mfu

A100 = "NVIDIA A100-SXM4-80GB"
MODEL = load_config("65b").model


def test_65b_at_the_papers_speed() -> None:
    """380 tokens/s/GPU are 48.5 % of an A100's peak with causal, 49.5 % with full attention counted."""
    assert step_mfu(MODEL, "bf16", 380, A100) == pytest.approx((0.485, 0.495), abs=6e-4)


@pytest.mark.parametrize("device", ["cpu", "NVIDIA H200 MIG 1g.18gb", ""])
def test_none_on_a_device_whose_peak_is_not_known(device: str) -> None:
    assert step_mfu(MODEL, "bf16", 380, device) == (None, None)


def test_none_in_fp32_whose_peak_is_another() -> None:
    assert step_mfu(MODEL, "fp32", 380, A100) == (None, None)


def test_this_machine_says_its_name_as_the_table_has_it() -> None:
    """Without a GPU there is none to report."""
    assert device_name() != "cpu" or step_mfu(MODEL, "bf16", 380, device_name()) == (None, None)
