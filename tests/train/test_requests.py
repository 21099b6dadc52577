"""A request to stop in every phase of a run, to one rank and to all: one save or none, exit code 75, and the
same numbers in the end."""

import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from llama_mcore.observe.goodput.spans import read_attempts
from tests.support.models import Small
from tests.support.product import checkpoints, metrics, numbers
from tests.train.attempts import SHORT, Attempt, Lived, ask, live

pytestmark = pytest.mark.process

# Phase in which the request comes -> the step that begins, which is the last one.
NOTHING_TRAINED = {"before": 0, "start": 0, "setup": 0}
SAVED = {"train": 2, "evaluate": 4, "save": 3}
PHASES = NOTHING_TRAINED | SAVED
SIGNALS = {"USR1": [1], "TERM": [0, 1]}
"""And the ranks that are asked."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("requests")


@pytest.fixture(scope="module")
def attempts(small: Small, folder: Path) -> dict[str, Lived]:
    """PHASE-SIGNAL: one that is asked to stop; two of these go on: PHASE-SIGNAL-rest."""

    def run(name: str, **what: Any) -> Lived:
        return live(Attempt([*small.overrides(folder / name), *SHORT], **what))

    found = {}
    for name, ranks in SIGNALS.items():
        number = signal.Signals[f"SIG{name}"]
        for phase, step in PHASES.items():
            fault = partial(signal.raise_signal if phase == "before" else ask, number)
            found[f"{phase}-{name}"] = run(
                f"{phase}-{name}", fault=fault, phase=phase, step=step, ranks=ranks
            )
    for name in ("evaluate-USR1", "save-TERM"):
        found[f"{name}-rest"] = run(name)
    found["end"] = run("end", fault=partial(ask, signal.SIGTERM), phase="end", step=9, ranks=[1])
    found["never"] = run("never", missing=1)
    return found


@pytest.fixture(scope="module")
def whole(uninterrupted: Callable[..., Path]) -> Path:
    return uninterrupted(SHORT)


@pytest.mark.parametrize("fault", SIGNALS)
@pytest.mark.parametrize("phase", PHASES)
def test_it_ends_with_75(attempts: dict[str, Lived], phase: str, fault: str) -> None:
    found = attempts[f"{phase}-{fault}"]
    assert found.codes == [75, 75], found.output
    assert "Traceback" not in found.output
    assert found.left_over == []


@pytest.mark.parametrize("fault", SIGNALS)
@pytest.mark.parametrize("phase", SAVED)
def test_what_was_trained_is_saved_once(
    attempts: dict[str, Lived], folder: Path, phase: str, fault: str
) -> None:
    last = SAVED[phase]
    asked, *_ = read_attempts(folder / f"{phase}-{fault}")
    assert asked.saved == sorted({*range(3, last + 1, 3), last})


@pytest.mark.parametrize("fault", SIGNALS)
@pytest.mark.parametrize("phase", NOTHING_TRAINED)
def test_before_the_first_step_nothing_is_saved(
    attempts: dict[str, Lived], folder: Path, phase: str, fault: str
) -> None:
    run_dir = folder / f"{phase}-{fault}"
    assert not list(run_dir.glob("checkpoints/*"))
    assert metrics(run_dir) == []


@pytest.mark.parametrize("fault", SIGNALS)
def test_what_is_made_ready_is_not_waited_for(attempts: dict[str, Lived], fault: str) -> None:
    """The model, whose size is said when it is there."""
    size = "parameters on 2 ranks"
    assert size in attempts[f"train-{fault}"].output
    assert size not in attempts[f"setup-{fault}"].output


def test_waiting_for_ranks_that_never_come_ends(attempts: dict[str, Lived]) -> None:
    assert attempts["never"].codes == [75]


def test_a_request_after_the_last_step_changes_nothing(
    attempts: dict[str, Lived], folder: Path, whole: Path
) -> None:
    assert attempts["end"].codes == [0, 0]
    assert checkpoints(folder / "end") == checkpoints(whole)


def test_a_run_goes_on_as_if_nothing_had_been(attempts: dict[str, Lived], folder: Path, whole: Path) -> None:
    assert attempts["save-TERM-rest"].codes == [0, 0]
    assert numbers(folder / "save-TERM") == numbers(whole)


def test_an_evaluation_that_was_stopped_is_recorded_and_all_else_is_the_same(
    attempts: dict[str, Lived], folder: Path, whole: Path
) -> None:
    assert attempts["evaluate-USR1-rest"].codes == [0, 0]
    found, expected = metrics(folder / "evaluate-USR1"), metrics(whole)
    assert [row["step"] for row in found if row.get("evaluation_stopped")] == [4]
    assert [row["step"] for row in found if "valid" in row] == [8, 9]
    assert [row["step"] for row in expected if "valid" in row] == [4, 8, 9]
    for name in ("loss", "grad_norm", "lr", "tokens"):
        assert [row[name] for row in found] == [row[name] for row in expected]
    assert found[-1]["valid"] == expected[-1]["valid"]
