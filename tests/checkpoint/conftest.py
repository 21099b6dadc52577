from pathlib import Path

import pytest

from tests.conftest import Once
from tests.support.world import call


@pytest.fixture(scope="session")
def saved(once: Once) -> Path:
    """What the jobs of jobs.py saved, one run folder each."""
    from tests.checkpoint.jobs import SAMPLE, save_and_load  # which import DeepSpeed

    return once("checkpoints", lambda folder: call(save_and_load, folder, SAMPLE))
