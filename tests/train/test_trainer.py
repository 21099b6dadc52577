"""llama_mcore.train.trainer and setup: what needs no job of several ranks. Whole runs are in test_run.py."""

import dataclasses
import gc
import logging
from collections.abc import Callable
from datetime import timedelta
from types import SimpleNamespace
from typing import NoReturn
from unittest.mock import patch

import pytest

from llama_mcore.checkpoint.train_state import HealthState, TrainState
from llama_mcore.config.load import load_config
from llama_mcore.config.schema import RunConfig
from llama_mcore.distributed.config import ParallelConfig
from llama_mcore.distributed.groups import TIMEOUT
from llama_mcore.errors import OutputError, Problem
from llama_mcore.observe.phases import Phases
from llama_mcore.train import setup
from llama_mcore.train import trainer as trainer_module
from llama_mcore.train.health import Action, Judgement
from llama_mcore.train.trainer import Trainer
from llama_mcore.watchdog.signals import StopRequest

PLACES = ["run.dir=run", "data.train=unused"]
LIMITS = ("first_step_s", "start_s", "setup_s", "save_s", "evaluate_s", "end_s", "min_step_s")


class Joining(Exception):
    """A run is about to join its groups."""


def timeout_of_collectives(run: RunConfig) -> timedelta:
    """Timeout with which a run of these settings joins its groups."""

    def join(parallel: ParallelConfig, seed: int, timeout: timedelta) -> NoReturn:
        raise Joining(timeout)

    with patch.object(setup, "process_groups", join), pytest.raises(Joining) as joining:
        setup.train(run, StopRequest())
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


def trainer(monkeypatch: pytest.MonkeyPatch, **parts: object) -> Trainer:
    """A Trainer of one rank that is made of these parts, and of nothing else."""
    monkeypatch.setattr(trainer_module, "run_on_all_ranks", lambda groups, action: action())
    fields = {field.name: None for field in dataclasses.fields(Trainer) if field.init}
    return Trainer(**fields | {"phases": Phases()} | parts)  # type: ignore[arg-type]


def test_a_job_that_loses_its_run_in_a_rollback_archives_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """While it reads the checkpoint to return to, which takes minutes."""
    done: list[str] = []

    def check() -> None:
        assert done == ["read"]
        raise OutputError(Problem("run.dir", "run", "the run was taken over"))

    def noted(what: str) -> Callable[..., None]:
        return lambda *_: done.append(what)

    for name, what in (("roll_back", "read"), ("archive_checkpoints_after", "archived")):
        monkeypatch.setattr(trainer_module, name, noted(what))
    job = trainer(
        monkeypatch,
        config=load_config("tiny", PLACES),
        state=TrainState(step=5),
        saver=SimpleNamespace(finish=lambda: None),
        sinks=SimpleNamespace(check=check, go_back=noted("metrics")),
    )
    with pytest.raises(OutputError):
        job.recover(Judgement(HealthState(), Action.ROLL_BACK, "too bad"))
    assert done == ["read"]


def test_garbage_is_collected_at_fixed_steps_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """And as usual again when the run is over."""
    collected, enabled = [], []

    def step(job: Trainer) -> tuple[Judgement, bool]:
        enabled.append(gc.isenabled())
        job.state = TrainState(step=job.state.step + 1)
        return Judgement(HealthState()), False

    monkeypatch.setattr(Trainer, "step", step)
    monkeypatch.setattr(Trainer, "save", lambda *_: None)
    monkeypatch.setattr(Trainer, "is_asked_to_stop", lambda _: False)
    job = trainer(
        monkeypatch,
        config=load_config("tiny", [*PLACES, "train.steps=250", "health.replica_interval=0"]),
        state=TrainState(step=30),
        saver=SimpleNamespace(finish=lambda: None),
    )
    monkeypatch.setattr(gc, "collect", lambda: collected.append(job.state.step))
    assert job.run() == 0
    assert collected == [30, 100, 200]
    assert set(enabled) == {False}
    assert (gc.isenabled(), gc.get_freeze_count()) == (True, 0)


@pytest.mark.parametrize(
    ("first", "step", "said", "exit_code"),
    [
        (0, 5, "finished 5 steps", 0),
        (2, 4, "stopped at step 4 of 5; run the same command to continue", 75),
        (5, 5, "nothing to do: the run has done 5 steps", 0),
        (7, 7, "nothing to do: the run has done 7 steps", 0),
    ],
)
def test_the_last_line_says_whether_anything_was_done(
    first: int,
    step: int,
    said: str,
    exit_code: int,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = SimpleNamespace(train=SimpleNamespace(steps=5))
    command = "the same command"
    job = trainer(monkeypatch, config=config, state=TrainState(step=step), command_to_continue=command)
    with caplog.at_level(logging.INFO):
        assert job._finish(first) == exit_code
    assert caplog.messages[-1].startswith(said)
