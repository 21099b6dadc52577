from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import orjson
import pytest

from llama_mcore.parallel.config import ParallelConfig
from llama_mcore.parallel.groups import Groups, process_groups
from tests.distributed import torchrun

WORKER = Path(__file__).with_name("worker.py")


@pytest.fixture(scope="module")
def alone() -> Iterator[Groups]:
    """The groups of a job of one process."""
    with process_groups(ParallelConfig(), seed=0) as groups:
        yield groups


@pytest.fixture(scope="session")
def on_ranks(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], dict[str, Any]]:
    """What tests/model/worker.py found on so many ranks; each job runs once."""
    folder = tmp_path_factory.mktemp("model")

    @cache
    def results(world_size: int) -> dict[str, Any]:
        output = folder / f"{world_size}.json"
        torchrun(world_size, WORKER, output)
        return orjson.loads(output.read_bytes())

    return results
