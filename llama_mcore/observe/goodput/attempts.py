"""What became of each life (a start) of a run: lines that the supervisor of rank 0 adds.

RUN_DIR/lives.jsonl, oldest first: a line when the life is known to be this run's, one when it has saved its
first checkpoint, one at its end; the last of a life stands. It has what timeline.jsonl cannot: when a life
that was killed ended, and lives that ended before they had begun to train. One without an end runs, or was
killed with its supervisor, as with its node.
"""

import os
from contextlib import suppress
from pathlib import Path

from pydantic import ValidationError

from llama_mcore.config.section import Section
from llama_mcore.observe.line_file import append, ends_torn, open_to_append, read_lines

LIVES_FILE = "lives.jsonl"


class NotedLife(Section):
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


class EndedLife(NotedLife):
    ended: float
    exit_code: int
    """Of the supervisor of rank 0."""
    asked: bool
    """It ended because it had been asked to stop."""


def add_life(run_dir: Path, life: NotedLife) -> None:
    """Raises OSError. The folder may not be there yet; a line that a full disk cut stays alone."""
    run_dir.mkdir(parents=True, exist_ok=True)
    with open_to_append(run_dir / LIVES_FILE) as file:
        append(file, b"\n" * ends_torn(file) + life.model_dump_json().encode() + b"\n")


def read_noted_lives(run_dir: Path) -> list[NotedLife]:
    """All that can be read, in the order of their first lines; lines that are not whole are passed over."""
    lives: list[NotedLife] = []
    without_end: dict[float, int] = {}
    with suppress(OSError):
        for line in read_lines(run_dir / LIVES_FILE):
            with suppress(ValueError):
                life = _parsed(line)
                place = without_end.pop(life.began, len(lives))
                lives[place : place + 1] = [life]
                if not isinstance(life, EndedLife):
                    without_end[life.began] = place
    return lives


def read_ended_lives(run_dir: Path) -> list[EndedLife]:
    """Those of `read_noted_lives` whose end was noted."""
    return [life for life in read_noted_lives(run_dir) if isinstance(life, EndedLife)]


def is_requeued(run_dir: Path) -> bool:
    """Whether Slurm has put this job back into the queue after it had begun the run: it comes with the same
    arguments, and those for the first start alone must not count again."""
    job = os.environ.get("SLURM_JOB_ID", "")
    # The number of restarts alone does not tell: a job that another one submits inherits it.
    if not job or os.environ.get("SLURM_RESTART_COUNT", "0") == "0":
        return False
    return any(life.job == job for life in read_noted_lives(run_dir))


def _parsed(line: bytes) -> NotedLife:
    try:
        return EndedLife.model_validate_json(line)
    except ValidationError:
        return NotedLife.model_validate_json(line)
