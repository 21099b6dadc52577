"""llama_mcore.train.trainer: what it settles before there is a job. Whole runs are in test_run.py."""

import logging
from datetime import timedelta
from types import SimpleNamespace
from typing import Any, NoReturn, cast
from unittest.mock import patch

import pytest

from llama_mcore.checkpoint.train_state import HealthState
from llama_mcore.config.load import load_config
from llama_mcore.config.schema import RunConfig
from llama_mcore.distributed.config import ParallelConfig
from llama_mcore.distributed.groups import TIMEOUT
from llama_mcore.errors import OutputError, Problem
from llama_mcore.observe.phases import Phases
from llama_mcore.train import trainer
from llama_mcore.train.health import Action, Judgement
from llama_mcore.train.setup import Job
from llama_mcore.watchdog.signals import StopRequest

LIMITS = ("first_step_s", "start_s", "setup_s", "save_s", "evaluate_s", "end_s", "min_step_s")


class Joining(Exception):
    """A run is about to join its groups."""


def timeout_of_collectives(run: RunConfig) -> timedelta:
    """That with which a run of these settings joins its groups."""

    def join(parallel: ParallelConfig, seed: int, timeout: timedelta) -> NoReturn:
        raise Joining(timeout)

    with patch.object(trainer, "process_groups", join), pytest.raises(Joining) as joining:
        trainer.train(run, StopRequest())
    (timeout,) = joining.value.args
    return timeout


@pytest.mark.parametrize("limit", LIMITS)
def test_collectives_outlast_every_limit_of_the_watchdog(limit: str) -> None:
    """Else they end the run first, and name nobody."""
    run = load_config("7b", [f"watchdog.{limit}=7200"])
    longest = timedelta(seconds=7200) + timedelta(seconds=run.checkpoint.timeout_s)
    assert timeout_of_collectives(run) > longest


def test_short_limits_leave_the_usual_timeout() -> None:
    short = [f"watchdog.{limit}=1" for limit in LIMITS]
    assert timeout_of_collectives(load_config("7b", [*short, "checkpoint.timeout_s=1"])) == TIMEOUT


def test_a_job_that_loses_its_run_while_it_rolls_back_puts_nothing_aside(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """When it has read the checkpoint to go back to, which takes minutes."""
    done: list[str] = []

    def lost() -> None:
        if done:
            raise OutputError(Problem("run.dir", "run", "the run was taken over"))

    def roll_back(*arguments: Any) -> None:
        *_, together, _ = arguments
        together(lambda: done.append("read"))
        together(lambda: done.append("put aside"))

    monkeypatch.setattr(trainer, "roll_back", roll_back)
    monkeypatch.setattr(trainer, "together", lambda groups, action: action())
    saver, sinks = SimpleNamespace(finish=lambda: None), SimpleNamespace(check=lost)
    state = SimpleNamespace(step=5)
    parts = {"run": None, "groups": None, "engine": None}
    job = SimpleNamespace(state=state, phases=Phases(), saver=saver, sinks=sinks, **parts)
    with pytest.raises(OutputError):
        trainer._return_or_stop(cast(Job, job), Judgement(HealthState(), Action.ROLL_BACK, "too bad"))
    assert done == ["read"]


@pytest.mark.parametrize(
    ("first", "step", "said", "exit_code"),
    [
        (0, 5, "finished 5 steps", 0),
        (2, 4, "stopped at step 4 of 5", 75),
        (5, 5, "nothing to do: the run has done 5 steps", 0),
        (7, 7, "nothing to do: the run has done 7 steps", 0),
    ],
)
def test_the_last_line_says_whether_anything_was_done(
    first: int, step: int, said: str, exit_code: int, caplog: pytest.LogCaptureFixture
) -> None:
    run, state = SimpleNamespace(train=SimpleNamespace(steps=5)), SimpleNamespace(step=step)
    job = SimpleNamespace(run=run, state=state, phases=Phases(), timeline=None)
    with caplog.at_level(logging.INFO):
        assert trainer._finish(cast(Job, job), first, "the same command") == exit_code
    assert caplog.messages[-1].startswith(said)
