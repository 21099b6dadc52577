"""Refuse to start a run again that has died in the same way too often. Reads RUN_DIR/attempts.jsonl."""

from collections.abc import Sequence
from pathlib import Path

from llama_mcore.errors import EXIT_SAVED, EXIT_SOFTWARE, LlamaMcoreError, NoProgressError, Problem
from llama_mcore.observe.goodput.attempts import (
    ATTEMPTS_FILE,
    AttemptEnded,
    AttemptStarted,
    read_noted_attempts,
)

ATTEMPTS = 3
"""So many attempts of a job in a row that saved nothing, and nobody asked to end."""


def check_progress(run_dir: Path, job: str) -> None:
    """Raise NoProgressError where the last attempts were fruitless: those of `job` (SLURM_JOB_ID), or of all
    where it has no name."""
    fruitless = last_fruitless(read_noted_attempts(run_dir), job)
    if len(fruitless) < ATTEMPTS:
        return
    ends = "; ".join(_end_of(attempt) for attempt in fruitless[-ATTEMPTS:])
    reason = f"its last {ATTEMPTS} attempts saved no checkpoint and ended {ends}"
    remedy = f"find the cause and give --retry; {ATTEMPTS_FILE} has all attempts"
    raise NoProgressError(Problem("run.dir", run_dir, reason, remedy))


def last_fruitless(attempts: Sequence[AttemptStarted], job: str) -> list[AttemptStarted]:
    """The attempts of `job` since the last one that was not fruitless, oldest first."""
    found: list[AttemptStarted] = []
    for attempt in reversed(attempts):
        if job and attempt.job != job:
            continue
        if not made_no_progress(attempt):
            break
        found.append(attempt)
    return found[::-1]


def made_no_progress(attempt: AttemptStarted) -> bool:
    """It saved nothing, and its end has no explanation: a crash, a kill, or a stall that ended with 75."""
    if not isinstance(attempt, AttemptEnded):
        return not attempt.saved  # killed with its supervisor
    explained = attempt.exit_code == 0 or was_explained(attempt.exit_code)
    asked = attempt.exit_code == EXIT_SAVED and attempt.asked
    return not (explained or asked or attempt.saved)


def was_explained(exit_code: int) -> bool:
    """It was an error that the user can fix, who was told. Not 70: what the numbers did they may do again,
    or a process left early."""
    codes = {error.exit_code for error in LlamaMcoreError.__subclasses__()}
    return exit_code in codes - {EXIT_SOFTWARE}


def _end_of(attempt: AttemptStarted) -> str:
    if not isinstance(attempt, AttemptEnded):
        return f"unseen, as when a node is lost or everything on {attempt.host} is killed"
    seconds = attempt.ended - attempt.began
    return (
        f"with exit code {attempt.exit_code} in step {attempt.step} on {attempt.host}, after {seconds:.0f} s"
    )
