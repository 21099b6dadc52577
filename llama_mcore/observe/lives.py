"""How each life (a start) of a run ended: a line that the supervisor of rank 0 adds at its end.

RUN_DIR/lives.jsonl, oldest first. It has what timeline.jsonl cannot: when a life that was killed ended, and
lives that ended before they had begun to train. A supervisor that was killed too, with its node, leaves none.
"""

import os
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from llama_mcore.section import Section
from llama_mcore.small_file import read_small_file

LIVES_FILE = "lives.jsonl"
_LARGEST = 64 << 20


class EndedLife(Section):
    """Times are seconds since 1970."""

    began: float
    """When the supervisor did, before anything was imported."""
    ended: float
    job: str
    """SLURM_JOB_ID, or nothing."""
    host: str
    ranks: int
    exit_code: int
    """Of the supervisor of rank 0."""
    asked: bool
    """It ended because it had been asked to stop."""
    saved: bool
    """It saved a checkpoint."""
    step: int
    """The last at work; 0 before the first."""


def add_life(run_dir: Path, life: EndedLife) -> None:
    """Raises OSError. The folder may not be there yet; a line that a full disk cut stays alone."""
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / LIVES_FILE).open("ab+", buffering=0) as file:
        file.write(b"\n" * ends_torn(file) + life.model_dump_json().encode() + b"\n")


def ends_torn(file: BinaryIO) -> bool:
    """Whether the last line of a file that is open for reading and appending lacks its end."""
    file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
    return file.read(1) not in (b"", b"\n")


def read_ended_lives(run_dir: Path) -> list[EndedLife]:
    """All that can be read; lines that are not whole are passed over."""
    lives: list[EndedLife] = []
    with suppress(OSError, ValueError):
        for line in read_small_file(run_dir / LIVES_FILE, _LARGEST).split(b"\n"):
            with suppress(ValueError):
                lives.append(EndedLife.model_validate_json(line))
    return lives
