"""metrics.jsonl: the lines that count, the steps that are missing, and the lines that leave it in a rollback.

Every line names its attempt by the number of the lease that the run was held by. From its first step on, the
lines of an attempt count and those of earlier attempts do not: one that was suspended, and went on when
another held the run, may have added a line.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Annotated, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from llama_mcore.errors import DataError, MissingInputError, Problem, input_problem
from llama_mcore.files import replace_durably
from llama_mcore.observe.line_file import append, ends_torn, open_to_append, read_lines
from llama_mcore.observe.log import get_logger

METRICS_FILE = "metrics.jsonl"
ABANDONED_METRICS = "metrics-abandoned.jsonl"
"""Steps that rollbacks abandoned. A step may be there twice, if the run was killed just then."""
_RANGES_SHOWN = 10
Count = Annotated[int, Field(ge=0, lt=1 << 63)]


class Row(BaseModel):
    """Fields of a line that every reader needs; a subclass adds those of its reader."""

    model_config = ConfigDict(strict=True, frozen=True, allow_inf_nan=False)

    step: Count
    attempt: Count = 0
    continues: str = ""
    """At the first step after a checkpoint of another folder, which has the steps before it: that
    checkpoint."""


R = TypeVar("R", bound=Row)


class Key(NamedTuple):
    """Fields that decide whether a line counts."""

    step: int
    attempt: int
    continues: bool


Steps = list[tuple[int, int]]
"""Ranges of steps: the first and the last of each."""


def read_metrics(path: Path, kind: type[R]) -> list[R]:
    """Lines that count, in the order of their steps. Raises as `read_every_line`."""
    rows = list(read_every_line(path, kind))
    return [rows[place] for place in counting([key_of(row) for row in rows])]


def read_every_line(path: Path, kind: type[R]) -> Iterator[R]:
    """All lines, oldest first, without a last one that is still being written.

    Raises MissingInputError without the file and DataError at a damaged line.
    """
    try:
        for number, line in enumerate(read_lines(path), start=1):
            yield _parsed(line, kind, f"{path}:{number}")
    except FileNotFoundError:
        raise MissingInputError(input_problem("metrics", path, "give the metrics.jsonl of a run")) from None
    except OSError as error:
        remedy = "restore the file from a copy, or move it away"
        raise DataError(input_problem("metrics", path, remedy, error)) from None


def _parsed(line: bytes, kind: type[R], where: str) -> R:
    try:
        return kind.model_validate_json(line)
    except ValidationError as error:
        first, *_ = error.errors()
        reason = ": ".join([*map(str, first["loc"]), first["msg"]])
        remedy = "fix that line, or remove it"
        raise DataError(Problem("metrics", where, f"is not a step ({reason})", remedy)) from None


def key_of(row: Row) -> Key:
    return Key(row.step, row.attempt, bool(row.continues))


def counting(keys: Sequence[Key]) -> list[int]:
    """Indices of the lines that count, in the order of their steps: an attempt's last line of each step."""
    firsts: dict[int, int] = {}
    for key in keys:
        firsts[key.attempt] = min(key.step, firsts.get(key.attempt, key.step))
    ends, end = {}, float("inf")
    for attempt in sorted(firsts, reverse=True):
        ends[attempt] = end
        end = min(end, firsts[attempt])
    last = {key.step: place for place, key in enumerate(keys) if key.step < ends[key.attempt]}
    return [last[step] for step in sorted(last)]


def missing_steps(keys: Iterable[Key], last: int) -> Steps:
    """Steps without a line, up to `last` or the last line, given the lines that count in the order of
    steps."""
    missing: Steps = []
    before = 0
    for key in keys:
        if key.continues:
            missing.clear()
        elif key.step > before + 1:
            missing.append((before + 1, key.step - 1))
        before = key.step
    if before < last:
        missing.append((before + 1, last))
    return missing


def describe_steps(steps: Steps) -> str:
    """Steps as text: 3, 5 to 9, 12"""
    shown = [f"{first:,}" if first == last else f"{first:,} to {last:,}" for first, last in steps]
    more = len(shown) - _RANGES_SHOWN
    return ", ".join([*islice(shown, _RANGES_SHOWN), *([f"{more:,} more ranges"] if more > 0 else [])])


def as_ranges(steps: Iterable[int]) -> Steps:
    ranges: Steps = []
    for step in sorted(set(steps)):
        if ranges and ranges[-1][1] == step - 1:
            ranges[-1] = (ranges[-1][0], step)
        else:
            ranges.append((step, step))
    return ranges


def drop_steps_after(metrics: Path, step: int) -> list[Key]:
    """Keep the complete lines of `metrics` that count, up to `step`, and return their keys in the order of
    steps. The file is replaced by a rename."""
    keys, size = [], 0
    try:
        for line in read_lines(metrics):
            keys.append(_key(line))
            size += len(line) + 1
    except FileNotFoundError:
        return []
    places = [place for place, key in enumerate(keys) if key]
    counted = [places[place] for place in counting([key for key in keys if key])]
    kept = {place: key for place in counted if (key := keys[place]) and key.step <= step}
    lost = [key.step for place, key in enumerate(keys) if key and key.step <= step and place not in kept]
    if lost:
        text = "%s: DROPPED %d lines of steps %s, which a later attempt replaced"
        get_logger().warning(text, metrics, len(lost), describe_steps(as_ranges(lost)))
    if len(kept) < len(keys) or size < metrics.stat().st_size:
        temporary = metrics.with_name(metrics.name + ".tmp")
        temporary.unlink(missing_ok=True)
        with temporary.open("xb") as file:
            file.writelines(line + b"\n" for place, line in enumerate(read_lines(metrics)) if place in kept)
        replace_durably(temporary, metrics)
    return list(kept.values())


def keep_steps_after(metrics: Path, step: int, kept: Path) -> None:
    """Append the complete lines of `metrics` after `step` to `kept`, and fsync it."""
    with open_to_append(kept) as file:
        append(file, b"\n" * ends_torn(file))
        for line in read_lines(metrics):
            key = _key(line)
            if key and key.step > step:
                append(file, line + b"\n")
        os.fsync(file.fileno())


def last_attempt(metrics: Path) -> int:
    """Highest attempt number of any line; 0 without lines. Raises OSError."""
    try:
        return max((key.attempt for line in read_lines(metrics) if (key := _key(line))), default=0)
    except FileNotFoundError:
        return 0


def _key(line: bytes) -> Key | None:
    """Key of a line; None for one that a kill or a crash left half-written."""
    try:
        return key_of(Row.model_validate_json(line))
    except ValidationError:
        return None


def sync_listing(folder: Path) -> None:
    """Fsync the names of the files of a folder."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
