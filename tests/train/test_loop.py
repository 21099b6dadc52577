"""llama_mcore.train.loop: what it settles before there is a job. Whole runs are in test_run.py."""

from datetime import timedelta
from typing import NoReturn
from unittest.mock import patch

import pytest

from llama_mcore.config import RunConfig, load_run
from llama_mcore.parallel.config import ParallelConfig
from llama_mcore.parallel.groups import TIMEOUT
from llama_mcore.train import loop
from llama_mcore.train.signals import StopRequest

LIMITS = ("first_step_s", "start_s", "setup_s", "save_s", "evaluate_s", "end_s", "min_step_s")


class Joining(Exception):
    """A run is about to join its groups."""


def timeout_of_collectives(run: RunConfig) -> timedelta:
    """That with which a run of these settings joins its groups."""

    def join(parallel: ParallelConfig, seed: int, timeout: timedelta) -> NoReturn:
        raise Joining(timeout)

    with patch.object(loop, "process_groups", join), pytest.raises(Joining) as joining:
        loop.train(run, StopRequest())
    (timeout,) = joining.value.args
    return timeout


@pytest.mark.parametrize("limit", LIMITS)
def test_collectives_outlast_every_limit_of_the_watchdog(limit: str) -> None:
    """Else they end the run first, and name nobody."""
    run = load_run("7b", [f"watchdog.{limit}=7200"])
    longest = timedelta(seconds=7200) + timedelta(seconds=run.checkpoint.timeout_s)
    assert timeout_of_collectives(run) > longest


def test_short_limits_leave_the_usual_timeout() -> None:
    short = [f"watchdog.{limit}=1" for limit in LIMITS]
    assert timeout_of_collectives(load_run("7b", [*short, "checkpoint.timeout_s=1"])) == TIMEOUT
