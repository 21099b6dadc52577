import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import ROOT

WORKER = Path(__file__).with_name("worker.py")
Results = Callable[[str, int], list[Any]]


@pytest.fixture(scope="session")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """results(job, world_size): what each rank of a job of worker.py found."""
    folder = tmp_path_factory.mktemp("parallel")
    done = subprocess.run(
        [sys.executable, WORKER, folder],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )

    def read(job: str, world_size: int) -> list[Any]:
        files = [folder / f"{job}-{rank}.json" for rank in range(world_size)]
        missing = [file.name for file in files if not file.exists()]
        assert not missing, f"no {missing}:\n{done.stdout[-8000:]}"
        return [json.loads(file.read_text()) for file in files]

    return read
