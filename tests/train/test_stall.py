"""A run that hangs is ended, explained, and goes on to where an undisturbed one ends.

One run on two ranks, and three attempts of it: in the first a thread keeps the interpreter, in the second a
read never returns, the third is left alone.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.models import Small
from tests.support.product import numbers
from tests.train.attempts import (
    SHORT,
    Attempt,
    Lived,
    first_steps,
    keep_the_interpreter,
    live,
    read_what_never_comes,
)

pytestmark = [pytest.mark.process, pytest.mark.wait]

IMPATIENT = ["watchdog.min_step_s=8"]  # more than what makes a rank silent


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stall") / "run"


@pytest.fixture(scope="module")
def attempts(small: Small, run_dir: Path) -> dict[str, Lived]:
    # What hangs would also keep a checkpoint that is written beside the training from its end.
    run = [*small.overrides(run_dir), *SHORT, "checkpoint.asynchronous=false"]
    gil = Attempt([*run, *IMPATIENT], keep_the_interpreter, step=5, ranks=[1])
    # the fifth read of its attempt, which begins after step 3: of step 8, while step 7 is under way
    read = Attempt([*run, *IMPATIENT], read_what_never_comes, phase="data", step=5, ranks=[0])
    return {"gil": live(gil), "read": live(read), "rest": live(Attempt(run))}


def stall(run_dir: Path, step: int) -> Path:
    return run_dir / f"stalls/{step:08d}"


@pytest.mark.parametrize("name", ["gil", "read"])
def test_it_ends_with_75_on_every_rank(attempts: dict[str, Lived], name: str) -> None:
    assert attempts[name].codes == [75, 75], attempts[name].output


@pytest.mark.parametrize(("name", "step", "rank"), [("gil", 5, 1), ("read", 7, 0)])
def test_the_rank_that_the_others_wait_for_is_named(
    attempts: dict[str, Lived], run_dir: Path, name: str, step: int, rank: int
) -> None:
    said, folder = attempts[name].output, stall(run_dir, step)
    summary = (folder / "summary.txt").read_text().strip()
    assert said.count(summary) == 1, said
    assert re.findall(r"rank (\d+) on ", summary) == [str(rank)]
    report = json.loads((folder / "rank-00000.json").read_text())
    assert (report["phase"], report["step"]) == ("train", step)
    assert "Traceback" not in said


def test_the_stacks_of_both_ranks_show_where_they_were(attempts: dict[str, Lived], run_dir: Path) -> None:
    stacks = [(stall(run_dir, 5) / f"rank-0000{rank}.txt").read_text() for rank in range(2)]
    assert "all_reduce" in stacks[0]
    assert "keep_the_interpreter" in stacks[1]
    stacks = [(stall(run_dir, 7) / f"rank-0000{rank}.txt").read_text() for rank in range(2)]
    assert "read_what_never_comes" in stacks[0]
    assert "in wait" in stacks[1]  # for the result of step 7


def test_it_goes_on_from_the_newest_checkpoint(attempts: dict[str, Lived], run_dir: Path) -> None:
    assert first_steps(run_dir) == [1, 4, 7]


def test_it_ends_as_an_undisturbed_run(
    attempts: dict[str, Lived], run_dir: Path, uninterrupted: Callable[..., Path]
) -> None:
    assert attempts["rest"].codes == [0, 0], attempts["rest"].output
    assert len(numbers(run_dir)) == 9
    assert numbers(run_dir) == numbers(uninterrupted(SHORT))


def test_no_process_is_left(attempts: dict[str, Lived]) -> None:
    assert [lived.left_over for lived in attempts.values()] == [[], [], []]
