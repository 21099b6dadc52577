"""Where the time of a run went, second by second: productive steps, lost steps, saving, evaluating,
restarting, and the time between its attempts. Read from RUN_DIR/timeline.jsonl, and from attempts.jsonl how
attempts ended; report.py prints it."""

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import orjson

from llama_mcore.errors import DataError, MissingInputError, Problem, input_problem
from llama_mcore.observe.goodput.attempts import AttemptEnded, read_ended_attempts
from llama_mcore.observe.goodput.timeline import TIMELINE_FILE
from llama_mcore.observe.line_file import read_lines
from llama_mcore.observe.metrics import describe_duration
from llama_mcore.observe.phases import Phase

STALE_S = 60.0
"""An attempt whose lease was not touched for so long is over; as in checkpoint/run_lock.py."""
PRODUCTIVE, LOST, EVALUATION, DOWN = "productive", "lost", "evaluation", "down"
KINDS = (PRODUCTIVE, LOST, "saving", EVALUATION, "restarting", "ending", DOWN)
_END_OF_TIME = 1e11
_KIND_OF_PHASE: dict[str, str] = {
    Phase.START: "restarting",
    Phase.SETUP: "restarting",
    Phase.TRAIN: PRODUCTIVE,
    Phase.EVALUATE: EVALUATION,
    Phase.SAVE: "saving",
    Phase.END: "ending",
}


@dataclass(frozen=True)
class Span:
    """Time that went into one thing; seconds since 1970."""

    attempt: int
    kind: str
    step: int
    began: float
    ended: float

    @property
    def seconds(self) -> float:
        return self.ended - self.began


@dataclass
class Attempt:
    """One start of the run."""

    lease: int
    """What it was written under; 0 if it ended before it held one."""
    began: float
    job: str
    ranks: int
    entries: list[tuple[float, str, int]] = field(default_factory=list)
    """Beginning, kind and step of what it did."""
    saved: list[int] = field(default_factory=list)
    """Steps of its checkpoints."""
    left: int | None = None
    """Exit code; None if it was killed, or runs."""
    ended: float = 0.0
    number: int = 0
    """Of the attempt among all, from 1."""

    @property
    def took_over(self) -> float:
        """When it came to hold the run, which is when its first line says that it did something."""
        return self.entries[0][0] if self.entries else self.began

    @property
    def runs(self) -> bool:
        """It was not noted as over, and its lease was touched lately."""
        return self.left is None and time.time() - self.ended < STALE_S


def read_attempts(run_dir: Path) -> list[Attempt]:
    """All attempts in the order of their beginnings. Lines that a kill or a full disk cut are passed over.

    Raises MissingInputError where there is no run, DataError where its files cannot be read.
    """
    timeline, noted = run_dir / TIMELINE_FILE, read_ended_attempts(run_dir)
    attempts: list[Attempt] = []
    try:
        for line in read_lines(timeline):
            with suppress(LookupError, TypeError, ValueError, OverflowError):
                _add_row(attempts, orjson.loads(line))
    except FileNotFoundError:  # a run may end before it has one
        if not noted:
            reason, remedy = f"has no {TIMELINE_FILE}", "give a run's folder"
            raise MissingInputError(Problem("RUN_DIR", run_dir, reason, remedy)) from None
    except OSError as error:
        remedy = "give a run's folder that you may read"
        raise DataError(input_problem("timeline", timeline, remedy, error)) from None
    _add_ends(attempts, noted)
    for number, attempt in enumerate(attempts, start=1):
        attempt.number = number
        attempt.ended = max(attempt.ended, attempt.began)
        if attempt.left is None:
            attempt.ended = max(attempt.ended, _last_sign(run_dir, attempt))
    return attempts


def _add_row(attempts: list[Attempt], row: object) -> None:
    if not isinstance(row, dict):
        raise TypeError
    if "attempt" in row:
        attempt = Attempt(int(row["attempt"]), _time(row["began"]), str(row["job"]), int(row["ranks"]))
        attempts.insert(_place(attempts, attempt), attempt)
    else:
        _add(_writer(attempts, row), row)


def _time(seconds: Any) -> float:
    """Raises ValueError for what no clock says."""
    if not 0 <= float(seconds) < _END_OF_TIME:
        raise ValueError
    return float(seconds)


def _place(attempts: Sequence[Attempt], attempt: Attempt) -> int:
    """Before those that took the run over from it and yet came to write first. A clock alone is not believed,
    nor is a lease: their numbers start from scratch where somebody deleted the folder."""
    place = len(attempts)
    while place and attempts[place - 1].lease > attempt.lease and attempts[place - 1].began > attempt.began:
        place -= 1
    return place


def _writer(attempts: Sequence[Attempt], row: dict[str, Any]) -> Attempt:
    """Whose line it is: the newest attempt's, if it is of a version that did not say. Raises LookupError."""
    for attempt in reversed(attempts):
        if row.get("of", attempt.lease) == attempt.lease:
            return attempt
    raise LookupError


def _add(attempt: Attempt, row: dict[str, Any]) -> None:
    when = _time(row["t"])
    if "phase" in row:
        attempt.entries.append((when, _KIND_OF_PHASE[row["phase"]], int(row["step"])))
    elif "saved" in row:
        attempt.saved.append(int(row["saved"]))
    else:
        attempt.left = int(row["left"])
    attempt.ended = max(attempt.ended, when)


def _add_ends(attempts: list[Attempt], noted: Sequence[AttemptEnded]) -> None:
    """Give attempts the ends that their supervisors noted, and put those in that never came to a timeline."""
    known = {attempt.began: attempt for attempt in attempts}
    place = 0
    for number, end in enumerate(noted):
        attempt = known.get(end.began)
        if attempt is None:
            # Before the next that is known, also where a clock ran ahead.
            following = [known[later.began] for later in noted[number:] if later.began in known]
            limit = min(map(attempts.index, following), default=len(attempts))
            while place < limit and attempts[place].began < end.began:
                place += 1
            attempt = Attempt(0, end.began, end.job, end.ranks)
            attempts.insert(place, attempt)
        attempt.left = end.exit_code
        attempt.ended = max(attempt.ended, end.ended)
        place = attempts.index(attempt) + 1


def _last_sign(run_dir: Path, attempt: Attempt) -> float:
    """When a killed attempt was seen last: its lease is touched every few seconds, and stays behind."""
    try:
        return (run_dir / "lease" / f"{attempt.lease:08d}.json").stat().st_mtime
    except OSError:
        return 0.0


def spans_of(attempts: Sequence[Attempt]) -> list[Span]:
    """The time from the first beginning to the last end, without a gap or an overlap."""
    spans: list[Span] = []
    for i, attempt in enumerate(attempts):
        if spans:
            spans.append(Span(attempt.number, DOWN, 0, spans[-1].ended, max(spans[-1].ended, attempt.began)))
        spans += _spans_of_attempt(
            attempt, spans[-1].ended if spans else attempt.began, _taken_over(attempts, i)
        )
    return [span for span in _marked(spans, _last_saved(attempts)) if span.seconds > 0]


def _taken_over(attempts: Sequence[Attempt], i: int) -> float:
    """When the next attempt took the run from attempt `i`, whose later time counts for nothing."""
    following = next((attempt.took_over for attempt in attempts[i + 1 :] if attempt.lease), float("inf"))
    return following if following > attempts[i].began else float("inf")  # a clock was set back


def _spans_of_attempt(attempt: Attempt, began: float, not_after: float) -> Iterator[Span]:
    """From `began` on, also where a clock says less: no time is counted twice."""
    kinds = [(_KIND_OF_PHASE[Phase.START], 0), *((kind, step) for _, kind, step in attempt.entries)]
    ends = [*(entry[0] for entry in attempt.entries), attempt.ended]
    for (kind, step), end in zip(kinds, ends, strict=True):
        ended = max(began, min(end, not_after))
        yield Span(attempt.number, kind, step, began, ended)
        began = ended


def _marked(spans: Sequence[Span], saved: float) -> list[Span]:
    """Steps, and evaluations after them, that came again later are lost, and those after step `saved`."""
    marked: list[Span] = []
    first_redone = saved + 1
    for span in reversed(spans):
        if span.kind in (PRODUCTIVE, EVALUATION) and span.step >= first_redone:
            span = replace(span, kind=LOST)
        elif span.kind == PRODUCTIVE:
            first_redone = span.step
        marked.append(span)
    return marked[::-1]


def _last_saved(attempts: Sequence[Attempt]) -> float:
    """The step from which the run would go on; of one that trains, its own is."""
    if not attempts or attempts[-1].runs:
        return float("inf")
    return next((attempt.saved[-1] for attempt in reversed(attempts) if attempt.saved), 0)


def seconds_by_kind(spans: Iterable[Span]) -> dict[str, float]:
    """All kinds, those without time too."""
    seconds = dict.fromkeys(KINDS, 0.0)
    for span in spans:
        seconds[span.kind] += span.seconds
    return seconds


def conclusion(spans: Sequence[Span]) -> str:
    seconds = seconds_by_kind(spans)
    total = sum(seconds.values())
    worst = max((kind for kind in KINDS if kind != PRODUCTIVE), key=lambda kind: seconds[kind])
    return (
        f"goodput {seconds[PRODUCTIVE] / total:.1%} of {describe_duration(total)}; "
        f"the most of the rest: {worst}, {seconds[worst] / total:.1%}"
    )
