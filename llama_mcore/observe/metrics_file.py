"""metrics.jsonl: which of its lines count, which steps it lacks, and what leaves it when a run goes back.

Every line says of which attempt it is, which is the number of the lease that the run was held by. An attempt
counts from its first step on, against all before it: one that was stopped, and went on when another had the
run, may have added a line.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Annotated, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from llama_mcore.errors import DataError, MissingInputError, Problem, input_problem
from llama_mcore.observe.line_file import append, ends_torn, open_to_append, read_lines
from llama_mcore.observe.log import get_logger

METRICS_FILE = "metrics.jsonl"
GIVEN_UP_METRICS = "metrics-given-up.jsonl"
"""The steps that rollbacks gave up. One may be there twice, if the run was killed just then."""
_RANGES_SHOWN = 10
Count = Annotated[int, Field(ge=0, lt=1 << 63)]


class Row(BaseModel):
    """What every reader needs of a line; a subclass names what else its reader does."""

    model_config = ConfigDict(strict=True, frozen=True, allow_inf_nan=False)

    step: Count
    attempt: Count = 0
    continues: str = ""
    """At the first step after a checkpoint of another folder, which has the steps before: that checkpoint."""


R = TypeVar("R", bound=Row)


class Key(NamedTuple):
    """What decides whether a line counts."""

    step: int
    attempt: int
    continues: bool


Steps = list[tuple[int, int]]
"""Ranges: the first and the last of each."""


def read_metrics(path: Path, kind: type[R]) -> list[R]:
    """The line of each step that counts, in the order of steps. Raises as `read_every_line`."""
    rows = list(read_every_line(path, kind))
    return [rows[place] for place in counting([key_of(row) for row in rows])]


def read_every_line(path: Path, kind: type[R]) -> Iterator[R]:
    """Lines, oldest first; a last one still being written is left out.

    Raises MissingInputError without the file and DataError at a damaged line.
    """
    try:
        for number, line in enumerate(read_lines(path), start=1):
            yield _parsed(line, kind, f"{path}:{number}")
    except FileNotFoundError:
        raise MissingInputError(input_problem("metrics", path, "give the metrics.jsonl of a run")) from None
    except OSError as error:
        remedy = "put a copy of the file there, or move away what is there"
        raise DataError(input_problem("metrics", path, remedy, error)) from None


def _parsed(line: bytes, kind: type[R], where: str) -> R:
    try:
        return kind.model_validate_json(line)
    except ValidationError as error:
        first, *_ = error.errors()
        reason = ": ".join([*map(str, first["loc"]), first["msg"]])
        remedy = "fix that line, or remove it"
        raise DataError(Problem("metrics", where, f"is no step ({reason})", remedy)) from None


def key_of(row: Row) -> Key:
    return Key(row.step, row.attempt, bool(row.continues))


def counting(keys: Sequence[Key]) -> list[int]:
    """Places of the lines that count, in the order of their steps. Of an attempt's lines of a step the last
    one does."""
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
    """Those up to `last`, or to the last that is there, of which there is no line, given the lines that count
    in the order of steps."""
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
    """3, 5 to 9, 12"""
    shown = [f"{first:,}" if first == last else f"{first:,} to {last:,}" for first, last in steps]
    more = len(shown) - _RANGES_SHOWN
    return ", ".join([*islice(shown, _RANGES_SHOWN), *([f"{more:,} ranges more"] if more > 0 else [])])


def as_ranges(steps: Iterable[int]) -> Steps:
    ranges: Steps = []
    for step in sorted(set(steps)):
        if ranges and ranges[-1][1] == step - 1:
            ranges[-1] = (ranges[-1][0], step)
        else:
            ranges.append((step, step))
    return ranges


def drop_steps_after(metrics: Path, step: int) -> list[Key]:
    """Keep the whole lines of `metrics` that count, up to `step`, and return their keys in the order of
    steps. The file is replaced in one move."""
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
        what = f"{len(lost):,} lines that count no more, of steps {describe_steps(as_ranges(lost))}"
        get_logger().warning("%s: DROPPED %s: a later attempt has those steps", metrics, what)
    if len(kept) < len(keys) or size < metrics.stat().st_size:
        temporary = metrics.with_name(metrics.name + ".tmp")
        temporary.unlink(missing_ok=True)
        with temporary.open("xb") as file:
            file.writelines(line + b"\n" for place, line in enumerate(read_lines(metrics)) if place in kept)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(metrics)
    return list(kept.values())


def keep_steps_after(metrics: Path, step: int, kept: Path) -> None:
    """Add the whole lines of `metrics` after `step` to the end of `kept`, and see them on the disk."""
    with open_to_append(kept) as file:
        append(file, b"\n" * ends_torn(file))
        for line in read_lines(metrics):
            key = _key(line)
            if key and key.step > step:
                append(file, line + b"\n")
        os.fsync(file.fileno())


def last_attempt(metrics: Path) -> int:
    """The highest number of any line; 0 without one. Raises OSError."""
    try:
        return max((key.attempt for line in read_lines(metrics) if (key := _key(line))), default=0)
    except FileNotFoundError:
        return 0


def _key(line: bytes) -> Key | None:
    """None for a line that a kill or a crash left half-written."""
    try:
        return key_of(Row.model_validate_json(line))
    except ValidationError:
        return None


def sync_listing(folder: Path) -> None:
    """See on the disk that the files of a folder are there."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
