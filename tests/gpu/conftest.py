from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from llama_mcore.distributed.device import DEVICE
from tests.support.product import Finished, finish, start, train
from tests.support.world import run_ranks

BOTH = ("cpu", pytest.param("gpu", marks=pytest.mark.gpu))


@dataclass(frozen=True)
class Place:
    """Place of a test: this machine's GPUs, or the CPU, where a twin shows the test to be valid."""

    gpu: bool

    def run(self, ranks: int, function: Callable[..., Any], *args: Any) -> Any:
        """Run a function on all ranks and return the result of the first."""
        self._need(ranks)
        return run_ranks(ranks, function, *args, spawn=self.gpu)[0]

    def train(self, *words: str, ranks: int = 1) -> Finished:
        """`llama-mcore train --config tiny WORDS`."""
        self._need(ranks)
        return finish(start([*words], ranks=ranks)) if self.gpu else train([*words], ranks=ranks)

    def _need(self, ranks: int) -> None:
        if self.gpu and torch.cuda.device_count() < ranks:
            pytest.skip(f"needs {ranks} GPUs, there is one")


@pytest.fixture(params=BOTH)
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Place:
    if request.param == "gpu":
        if not torch.cuda.is_available():
            pytest.skip("needs a GPU")
        for variable in (DEVICE, "DS_ACCELERATOR"):  # tests/conftest.py sets them
            monkeypatch.delenv(variable, raising=False)
    return Place(request.param == "gpu")
