"""llama_mcore.train.loop: what it settles before there is a job. Whole runs are in test_run.py."""

from datetime import timedelta

import pytest

from llama_mcore.config import load_run
from llama_mcore.parallel.groups import TIMEOUT
from llama_mcore.train.loop import _collectives_timeout

LIMITS = ("first_step_s", "start_s", "setup_s", "save_s", "evaluate_s", "end_s", "min_step_s")


@pytest.mark.parametrize("limit", LIMITS)
def test_collectives_outlast_every_limit_of_the_watchdog(limit: str) -> None:
    """Else they end the run first, and name nobody."""
    run = load_run("7b", [f"watchdog.{limit}=7200"])
    longest = timedelta(seconds=7200) + timedelta(seconds=run.checkpoint.timeout_s)
    assert _collectives_timeout(run) > longest


def test_short_limits_leave_the_usual_timeout() -> None:
    short = [f"watchdog.{limit}=1" for limit in LIMITS]
    assert _collectives_timeout(load_run("7b", [*short, "checkpoint.timeout_s=1"])) == TIMEOUT
