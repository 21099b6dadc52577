from pathlib import Path

import pytest

from tests.conftest import Once
from tests.support.world import call


@pytest.fixture(scope="session")
def saved(once: Once) -> Path:
    """Run folders that the jobs of jobs.py saved, one each."""
    from tests.checkpoint.jobs import SAMPLE, save_and_load  # which import DeepSpeed

    return once("checkpoints", lambda folder: call(save_and_load, folder, SAMPLE))
