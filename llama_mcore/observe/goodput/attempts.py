"""What became of each attempt (a start) of a run: lines that the supervisor of rank 0 adds.

RUN_DIR/attempts.jsonl, oldest first: a line when the attempt is known to be this run's, one when it has saved
its first checkpoint, one at its end; the last of an attempt stands. It has what timeline.jsonl cannot: when
an attempt that was killed ended, and attempts that ended before they had begun to train. One without an end
runs, or was killed with its supervisor, as with its node.
"""

import os
from contextlib import suppress
from pathlib import Path

from pydantic import ValidationError

from llama_mcore.config.section import Section
from llama_mcore.observe.line_file import append, ends_torn, open_to_append, read_lines

ATTEMPTS_FILE = "attempts.jsonl"


class AttemptStarted(Section):
    """Times are seconds since 1970."""

    began: float
    """When the supervisor did, before anything was imported."""
    job: str
    """SLURM_JOB_ID, or nothing."""
    host: str
    ranks: int
    saved: bool
    """It saved a checkpoint."""
    step: int
    """The last at work when this was noted; 0 before the first."""


class AttemptEnded(AttemptStarted):
    ended: float
    exit_code: int
    """Of the supervisor of rank 0."""
    asked: bool
    """It ended because it had been asked to stop."""


def add_attempt(run_dir: Path, attempt: AttemptStarted) -> None:
    """Raises OSError. The folder may not be there yet; a line that a full disk cut stays alone."""
    run_dir.mkdir(parents=True, exist_ok=True)
    with open_to_append(run_dir / ATTEMPTS_FILE) as file:
        append(file, b"\n" * ends_torn(file) + attempt.model_dump_json().encode() + b"\n")


def read_noted_attempts(run_dir: Path) -> list[AttemptStarted]:
    """All that can be read, in the order of their first lines; lines that are not whole are passed over."""
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
    """Those of `read_noted_attempts` whose end was noted."""
    return [attempt for attempt in read_noted_attempts(run_dir) if isinstance(attempt, AttemptEnded)]


def is_requeued(run_dir: Path) -> bool:
    """Whether Slurm has put this job back into the queue after it had begun the run: it comes with the same
    arguments, and those for the first start alone must not count again."""
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
