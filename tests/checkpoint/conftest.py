from pathlib import Path

import pytest

from tests.forked import run_worker

WORKER = Path(__file__).with_name("jobs.py")


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the jobs of jobs.py saved, one run folder each."""
    folder = tmp_path_factory.mktemp("checkpoints")
    run_worker(WORKER, folder, "sample")
    return folder
