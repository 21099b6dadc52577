from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import orjson
import pytest
import torch

from llama_mcore.distributed.config import ParallelConfig
from llama_mcore.distributed.device import DEVICE
from llama_mcore.distributed.groups import Groups, process_groups
from tests.conftest import Once
from tests.model.cases import answers
from tests.support.world import run_ranks

OnRanks = Callable[[ModuleType, int], dict[str, list[Any]]]


@pytest.fixture(scope="module")
def alone() -> Iterator[Groups]:
    """The groups of a job of one process."""
    with process_groups(ParallelConfig(), seed=0) as groups:
        yield groups


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """This machine's GPU, for tests marked `gpu`; no other test uses it."""
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    monkeypatch.delenv(DEVICE, raising=False)
    return torch.device("cuda")


@pytest.fixture(scope="session")
def on_ranks(once: Once) -> OnRanks:
    """on_ranks(module, tp): what each rank of one tensor-parallel group found in each case of a module of
    tests/model/cases. A job runs once, also one that fails."""

    @cache
    def found(module: ModuleType, tp: int) -> dict[str, list[Any]]:
        def make(folder: Path) -> None:
            ranks = run_ranks(tp, answers, module.cases)
            by_case = {case: [rank[case] for rank in ranks] for case in ranks[0]}
            (folder / "found.json").write_bytes(orjson.dumps(by_case))

        folder = once(f"{module.__name__}-{tp}", make)
        return orjson.loads((folder / "found.json").read_bytes())

    return found
