"""A step that begins before the result of the one before is read: what ranks exchange for that, and that what
fails on one of them meanwhile ends all together, for the same reason."""

import os
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from llama_mcore.config.load import load_config
from llama_mcore.errors import DataError, LlamaMcoreError, OutputError, Problem, report_errors
from llama_mcore.observe.sinks import MetricSinks
from llama_mcore.train.setup import train
from llama_mcore.train.trainer import Trainer
from llama_mcore.watchdog.signals import StopRequest
from tests.support.errors import is_shown
from tests.support.models import Small
from tests.support.product import checkpoints, metrics
from tests.support.world import exit_codes_of, run_ranks, write_output_to
from tests.train.test_step import Calls

pytestmark = pytest.mark.process

STEPS = ["train.steps=9", "eval.interval=0", "checkpoint.interval=9"]
LAYOUTS = {"dp-zero3": ["parallel.tp=1", "zero.stage=3"], "tp-sp-zero1": ["parallel.tp=2"]}
"""In whose forwards ranks wait for each other."""
of_layouts = pytest.mark.parametrize("layout", LAYOUTS)


def calls_of_steps(overrides: list[str]) -> list[tuple[list[str], int]]:
    """Collectives of each step of a run, and how often the host reads a value from its device."""
    found, step = [], Trainer.step

    def counted(trainer: Trainer) -> Any:
        with Calls() as calls:
            judged = step(trainer)
        found.append((calls.collectives, len(calls.reads)))
        return judged

    with patch.object(Trainer, "step", counted):
        assert train(load_config("tiny", overrides), StopRequest()) == 0
    return found


def run_with_a_fault(overrides: list[str], output: Path, owner: type, name: str, rank: int) -> None:
    """A run in which the fourth call of a method fails on one rank."""
    write_output_to(output)
    method = getattr(owner, name)
    failing = failing_in_its_fourth_call(method) if os.environ["RANK"] == str(rank) else method
    with report_errors(), patch.object(owner, name, failing):
        sys.exit(train(load_config("tiny", overrides), StopRequest()))


def failing_in_its_fourth_call(method: Callable[..., Any]) -> Callable[..., Any]:
    calls = count(1)

    def called(*arguments: Any) -> Any:
        if next(calls) == 4:
            raise error_of(method.__name__)
        return method(*arguments)

    return called


def error_of(name: str) -> LlamaMcoreError:
    if name == "write":
        return OutputError(Problem("run.dir", "here", "is full"))
    return DataError(Problem("window", 7, "cannot be read"))


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_ranks_exchange_one_sum_a_step(small: Small, tmp_path: Path, stage: int) -> None:
    """Step 5 is read at once, since a check of replicas is due after it, and so is the last: what they report
    is written on all ranks or none, and step 6 reads its data likewise. In the first two ZeRO 3 notes the
    order of the modules."""
    settings = ["parallel.tp=1", "train.precision=fp32", "train.steps=7", "health.replica_interval=5"]
    overrides = [*small.overrides(tmp_path / "run"), *STEPS, *settings, f"zero.stage={stage}", "data.valid="]
    one, two = (["allreduce_"], 1), (["allreduce_", "allreduce_"], 2)
    assert [found[2:] for found in run_ranks(2, calls_of_steps, overrides)] == [[one, one, two, two, two]] * 2


@of_layouts
def test_data_that_one_rank_cannot_read_ends_all_before_that_step(
    small: Small, tmp_path: Path, layout: str
) -> None:
    run_dir, output = tmp_path / "run", tmp_path / "output.txt"
    overrides = [*small.overrides(run_dir), *STEPS, *LAYOUTS[layout]]
    assert exit_codes_of(2, run_with_a_fault, overrides, output, Trainer, "_read", 1) == [65, 65]
    assert is_shown(output.read_text(), "window", 7, remedy=False)
    assert [row["step"] for row in metrics(run_dir)] == [1, 2, 3]


@of_layouts
def test_a_report_that_cannot_be_written_ends_all_after_the_next_step(
    small: Small, tmp_path: Path, layout: str
) -> None:
    run_dir, output = tmp_path / "run", tmp_path / "output.txt"
    overrides = [*small.overrides(run_dir), *STEPS, *LAYOUTS[layout]]
    assert exit_codes_of(2, run_with_a_fault, overrides, output, MetricSinks, "write", 0) == [73, 73]
    assert is_shown(output.read_text(), "run.dir", remedy=False)
    assert [row["step"] for row in metrics(run_dir)] == [1, 2, 3]
    assert checkpoints(run_dir) == []
