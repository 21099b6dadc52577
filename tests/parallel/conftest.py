import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.forked import run_worker

WORKER = Path(__file__).with_name("worker.py")
Results = Callable[[str, int], list[Any]]


@pytest.fixture(scope="session")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """results(job, world_size): what each rank of a job of worker.py found."""
    folder = tmp_path_factory.mktemp("parallel")
    run_worker(WORKER, folder)
    return lambda job, world_size: [
        json.loads((folder / f"{job}-{rank}.json").read_text()) for rank in range(world_size)
    ]
