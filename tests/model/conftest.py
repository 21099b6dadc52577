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
    """What tests/model/worker.py found on so many ranks; each job runs once, also one that fails."""
    folder = tmp_path_factory.mktemp("model")

    @cache
    def results_or_failure(world_size: int) -> dict[str, Any] | AssertionError:
        output = folder / f"{world_size}.json"
        try:
            torchrun(world_size, WORKER, output, timeout=300)
        except AssertionError as failure:
            return failure
        return orjson.loads(output.read_bytes())

    def results(world_size: int) -> dict[str, Any]:
        found = results_or_failure(world_size)
        if isinstance(found, AssertionError):
            pytest.fail(str(found), pytrace=False)
        return found

    return results
