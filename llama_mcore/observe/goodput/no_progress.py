"""Refuse to start a run again that has died in the same way too often. Reads RUN_DIR/lives.jsonl."""

from collections.abc import Sequence
from pathlib import Path

from llama_mcore.errors import EXIT_SAVED, EXIT_SOFTWARE, NoProgressError, Problem, UserError
from llama_mcore.observe.goodput.attempts import LIVES_FILE, EndedLife, NotedLife, read_noted_lives

LIVES = 3
"""So many lives of a job in a row that saved nothing, and nobody asked to end."""


def check_progress(run_dir: Path, job: str) -> None:
    """Raise NoProgressError where the last lives were fruitless: those of `job` (SLURM_JOB_ID), or of all
    where it has no name."""
    fruitless = last_fruitless(read_noted_lives(run_dir), job)
    if len(fruitless) < LIVES:
        return
    ends = "; ".join(_end_of(life) for life in fruitless[-LIVES:])
    bound = f"its last {LIVES} lives saved no checkpoint and ended {ends}"
    remedy = f"find the cause and give --retry; {LIVES_FILE} has all lives"
    raise NoProgressError(Problem("run.dir", run_dir, bound, remedy))


def last_fruitless(lives: Sequence[NotedLife], job: str) -> list[NotedLife]:
    """The lives of `job` since the last one that was not fruitless, oldest first."""
    found: list[NotedLife] = []
    for life in reversed(lives):
        if job and life.job != job:
            continue
        if not is_fruitless(life):
            break
        found.append(life)
    return found[::-1]


def is_fruitless(life: NotedLife) -> bool:
    """It saved nothing, and its end has no explanation: a crash, a kill, or a stall that ended with 75."""
    if not isinstance(life, EndedLife):
        return not life.saved  # killed with its supervisor
    explained = life.exit_code == 0 or was_explained(life.exit_code)
    asked = life.exit_code == EXIT_SAVED and life.asked
    return not (explained or asked or life.saved)


def was_explained(exit_code: int) -> bool:
    """It was an error that the user can mend, who was told. Not 70: what the numbers did they may do again,
    or a process left early."""
    codes = {error.exit_code for error in UserError.__subclasses__()}
    return exit_code in codes - {EXIT_SOFTWARE}


def _end_of(life: NotedLife) -> str:
    if not isinstance(life, EndedLife):
        return f"unseen, as when a node is lost or everything on {life.host} is killed"
    seconds = life.ended - life.began
    return f"with exit code {life.exit_code} in step {life.step} on {life.host}, after {seconds:.0f} s"
