"""llama_mcore.parallel.device: one variable keeps tests, and whoever sets it, away from a machine's GPUs."""

import os
from pathlib import Path

import pytest
import torch

from llama_mcore.errors import ConfigError
from llama_mcore.parallel.device import DEVICE, communication_backend, local_device, on_gpu
from tests.support.errors import refused
from tests.support.models import Small
from tests.support.product import run_command
from tests.support.world import exit_codes_of, write_output_to


@pytest.fixture
def visible_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


def test_tests_run_on_the_cpu(visible_gpu: None) -> None:
    assert not on_gpu()
    assert local_device() == torch.device("cpu")
    assert communication_backend() == "gloo"


@pytest.mark.parametrize("value", ["auto", "", None])
def test_a_gpu_is_taken_where_nobody_says_otherwise(
    visible_gpu: None, monkeypatch: pytest.MonkeyPatch, value: str | None
) -> None:
    monkeypatch.delenv(DEVICE)
    if value is not None:
        monkeypatch.setenv(DEVICE, value)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert on_gpu()
    assert local_device() == torch.device("cuda", 1)
    assert communication_backend() == "nccl"


def test_another_value_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DEVICE, "tpu")
    with refused(ConfigError, DEVICE, "tpu"):
        on_gpu()


def beside_a_gpu(settings: list[str], device: str, output: Path) -> None:
    """Train where torch says that there is a GPU; what touches it fails."""
    write_output_to(output)
    os.environ[DEVICE] = device
    torch.cuda.is_available = lambda: True
    torch.cuda.device_count = lambda: 1

    for name in ("_lazy_init", "set_device"):

        def touched(*_: object) -> None:
            raise AssertionError("the GPU was touched")

        setattr(torch.cuda, name, touched)
    run_command(["train", "--config", "tiny", *settings])


@pytest.mark.process
@pytest.mark.parametrize(("device", "untouched"), [("cpu", True), ("auto", False)])
def test_no_rank_touches_a_gpu_that_is_there(
    small: Small, tmp_path: Path, device: str, untouched: bool
) -> None:
    settings = [*small.overrides(tmp_path / "run"), "train.steps=4", "optim.warmup_steps=1"]
    codes = exit_codes_of(2, beside_a_gpu, settings, device, tmp_path / "output.txt")
    said = (tmp_path / "output.txt").read_text()
    assert (codes == [0, 0]) is untouched, said
    assert ("the GPU was touched" in said) is not untouched, said
