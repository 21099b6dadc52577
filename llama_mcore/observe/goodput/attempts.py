"""Attempts (starts) of a run, noted by the supervisor of rank 0; too many without progress are refused.

RUN_DIR/attempts.jsonl, oldest first: a line when the attempt is known to be this run's, one when it has saved
its first checkpoint, one at its end; the last of an attempt counts. It has what timeline.jsonl cannot: when
an attempt that was killed ended, and attempts that ended before they began to train. One without an end still
runs, or was killed together with its supervisor, as when a node is lost.
"""

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from pydantic import ValidationError

from llama_mcore.config.section import Section
from llama_mcore.errors import EXIT_SAVED, EXIT_SOFTWARE, LlamaMcoreError, NoProgressError, Problem
from llama_mcore.observe.line_file import append, ends_torn, open_to_append, read_lines

ATTEMPTS_FILE = "attempts.jsonl"
MAX_FRUITLESS = 3
"""Fruitless attempts of a job in a row after which it is not started again."""


class AttemptStarted(Section):
    """An attempt as far as it has come. Times are seconds since 1970."""

    began: float
    """Start of the supervisor, before anything was imported."""
    job: str
    """SLURM_JOB_ID, or ""."""
    host: str
    ranks: int
    saved: bool
    """True if it has saved a checkpoint."""
    step: int
    """Current step when this was noted; 0 before the first."""


class AttemptEnded(AttemptStarted):
    """An attempt that has ended."""

    ended: float
    exit_code: int
    """Exit code of the supervisor of rank 0."""
    asked: bool
    """True if it ended because it was asked to stop."""


def add_attempt(run_dir: Path, attempt: AttemptStarted) -> None:
    """Add a line, in a folder that need not exist yet. Raises OSError."""
    run_dir.mkdir(parents=True, exist_ok=True)
    with open_to_append(run_dir / ATTEMPTS_FILE) as file:
        # after a line that a full disk cut, on a line of its own
        append(file, b"\n" * ends_torn(file) + attempt.model_dump_json().encode() + b"\n")


def read_noted_attempts(run_dir: Path) -> list[AttemptStarted]:
    """Attempts in the order of their first lines; lines that cannot be parsed are skipped."""
    attempts: list[AttemptStarted] = []
    without_end: dict[float, int] = {}
    with suppress(OSError):
        for line in read_lines(run_dir / ATTEMPTS_FILE):
            with suppress(ValueError):
                attempt = _parsed(line)
                place = without_end.pop(attempt.began, len(attempts))
                attempts[place : place + 1] = [attempt]
                if not isinstance(attempt, AttemptEnded):
                    without_end[attempt.began] = place
    return attempts


def read_ended_attempts(run_dir: Path) -> list[AttemptEnded]:
    """Attempts whose end was noted."""
    return [attempt for attempt in read_noted_attempts(run_dir) if isinstance(attempt, AttemptEnded)]


def check_progress(run_dir: Path, job: str) -> None:
    """Raise NoProgressError where the last attempts of `job` (SLURM_JOB_ID; "" counts all) were fruitless."""
    fruitless = last_fruitless(read_noted_attempts(run_dir), job)
    if len(fruitless) < MAX_FRUITLESS:
        return
    ends = "; ".join(_end_of(attempt) for attempt in fruitless[-MAX_FRUITLESS:])
    reason = f"its last {MAX_FRUITLESS} attempts saved no checkpoint and ended {ends}"
    remedy = f"fix the cause, then start once with --retry; {ATTEMPTS_FILE} lists all attempts"
    raise NoProgressError(Problem("run.dir", run_dir, reason, remedy))


def last_fruitless(attempts: Sequence[AttemptStarted], job: str) -> list[AttemptStarted]:
    """Attempts of `job` since its last that was not fruitless, oldest first."""
    found: list[AttemptStarted] = []
    for attempt in reversed(attempts):
        if job and attempt.job != job:
            continue
        if not made_no_progress(attempt):
            break
        found.append(attempt)
    return found[::-1]


def made_no_progress(attempt: AttemptStarted) -> bool:
    """True if it saved nothing and ended without an explanation: a crash, a kill, or a stall (75)."""
    if not isinstance(attempt, AttemptEnded):
        return not attempt.saved  # killed with its supervisor
    explained = attempt.exit_code == 0 or was_explained(attempt.exit_code)
    asked = attempt.exit_code == EXIT_SAVED and attempt.asked
    return not (explained or asked or attempt.saved)


def was_explained(exit_code: int) -> bool:
    """True if the exit code is that of an error which the user was told about and can fix."""
    # not 70: the numbers may do the same again, or a process ended early
    codes = {error.exit_code for error in LlamaMcoreError.__subclasses__()}
    return exit_code in codes - {EXIT_SOFTWARE}


def _end_of(attempt: AttemptStarted) -> str:
    if not isinstance(attempt, AttemptEnded):
        return f"unnoticed, as when {attempt.host} is lost or everything on it is killed"
    seconds = attempt.ended - attempt.began
    return (
        f"with exit code {attempt.exit_code} in step {attempt.step} on {attempt.host}, after {seconds:.0f} s"
    )


def is_requeued(run_dir: Path) -> bool:
    """True if Slurm has requeued this job after it began the run: arguments that are meant for its first
    start must not count again."""
    job = os.environ.get("SLURM_JOB_ID", "")
    # The number of restarts alone does not tell: a job that another one submits inherits it.
    if not job or os.environ.get("SLURM_RESTART_COUNT", "0") == "0":
        return False
    return any(attempt.job == job for attempt in read_noted_attempts(run_dir))


def _parsed(line: bytes) -> AttemptStarted:
    try:
        return AttemptEnded.model_validate_json(line)
    except ValidationError:
        return AttemptStarted.model_validate_json(line)
