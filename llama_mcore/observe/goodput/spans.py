"""Spans of the time of a run, without gaps: productive steps, lost steps, saving, evaluation, restarting, and
the time between its attempts.

Read from RUN_DIR/timeline.jsonl, and the ends of attempts from attempts.jsonl; report.py prints them.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from llama_mcore.errors import DataError, MissingInputError, Problem, input_problem
from llama_mcore.observe.goodput.attempts import AttemptEnded, read_ended_attempts
from llama_mcore.observe.goodput.timeline import TIMELINE_FILE
from llama_mcore.observe.line_file import read_lines
from llama_mcore.observe.metrics import describe_duration
from llama_mcore.observe.phases import Phase
from llama_mcore.small_file import parse_json

STALE_S = 60.0
"""Seconds after which an attempt is over whose lease was not touched; as in checkpoint/run_lock.py."""
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
    """Stretch of time of one kind; seconds since 1970."""

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
    """An attempt of the run."""

    lease: int
    """Number of its lease; 0 if it ended before it held one."""
    began: float
    job: str
    ranks: int
    entries: list[tuple[float, str, int]] = field(default_factory=list)
    """Beginning, kind and step of each of its phases."""
    saved: list[int] = field(default_factory=list)
    """Steps of its checkpoints."""
    left: int | None = None
    """Exit code; None if it was killed, or still runs."""
    ended: float = 0.0
    number: int = 0
    """Number of the attempt among all, from 1."""

    @property
    def took_over(self) -> float:
        """Time from which it held the run: that of its first phase."""
        return self.entries[0][0] if self.entries else self.began

    @property
    def runs(self) -> bool:
        """True if it still runs: its end was not noted, and its lease was touched lately."""
        return self.left is None and time.time() - self.ended < STALE_S


def read_attempts(run_dir: Path) -> list[Attempt]:
    """All attempts in the order of their beginnings. Lines that a kill or a full disk cut are skipped.

    Raises MissingInputError where there is no run, DataError where its files cannot be read.
    """
    timeline, noted = run_dir / TIMELINE_FILE, read_ended_attempts(run_dir)
    attempts: list[Attempt] = []
    try:
        for line in read_lines(timeline):
            with suppress(LookupError, TypeError, ValueError, OverflowError):
                _add_row(attempts, parse_json(line))
    except FileNotFoundError:  # a run may end before it has one
        if not noted:
            reason, remedy = f"has no {TIMELINE_FILE}", "give the folder of a run"
            raise MissingInputError(Problem("RUN_DIR", run_dir, reason, remedy)) from None
    except OSError as error:
        remedy = "give the folder of a run that you may read"
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
    """Seconds since 1970. Raises ValueError for what no clock shows."""
    if not 0 <= float(seconds) < _END_OF_TIME:
        raise ValueError
    return float(seconds)


def _place(attempts: Sequence[Attempt], attempt: Attempt) -> int:
    """Index of a new attempt: before those that took the run over from it and yet wrote first."""
    # neither clocks nor leases decide alone: lease numbers start again where the folder was deleted
    place = len(attempts)
    while place and attempts[place - 1].lease > attempt.lease and attempts[place - 1].began > attempt.began:
        place -= 1
    return place


def _writer(attempts: Sequence[Attempt], row: dict[str, Any]) -> Attempt:
    """Attempt that wrote a line; the newest, if a version wrote it that did not name it. Raises
    LookupError."""
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
    """Add the ends that supervisors noted, and the attempts that never came to write a timeline."""
    known = {attempt.began: attempt for attempt in attempts}
    place = 0
    for number, end in enumerate(noted):
        attempt = known.get(end.began)
        if attempt is None:
            # Before the next known attempt, even where a clock ran ahead.
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
    """Time of the last sign of a killed attempt: its lease, which was touched every few seconds, and
    stays."""
    try:
        return (run_dir / "lease" / f"{attempt.lease:08d}.json").stat().st_mtime
    except OSError:
        return 0.0


def spans_of(attempts: Sequence[Attempt]) -> list[Span]:
    """Spans from the first beginning to the last end, without gaps or overlaps."""
    spans: list[Span] = []
    for i, attempt in enumerate(attempts):
        if spans:
            spans.append(Span(attempt.number, DOWN, 0, spans[-1].ended, max(spans[-1].ended, attempt.began)))
        spans += _spans_of_attempt(
            attempt, spans[-1].ended if spans else attempt.began, _taken_over(attempts, i)
        )
    return [span for span in _marked(spans, _last_saved(attempts)) if span.seconds > 0]


def _taken_over(attempts: Sequence[Attempt], i: int) -> float:
    """Time at which the next attempt took the run over from attempt `i`, whose later time does not count."""
    following = next((attempt.took_over for attempt in attempts[i + 1 :] if attempt.lease), float("inf"))
    return following if following > attempts[i].began else float("inf")  # a clock was set back


def _spans_of_attempt(attempt: Attempt, began: float, not_after: float) -> Iterator[Span]:
    """Spans of an attempt from `began` on, even where a clock shows less: no time is counted twice."""
    kinds = [(_KIND_OF_PHASE[Phase.START], 0), *((kind, step) for _, kind, step in attempt.entries)]
    ends = [*(entry[0] for entry in attempt.entries), attempt.ended]
    for (kind, step), end in zip(kinds, ends, strict=True):
        ended = max(began, min(end, not_after))
        yield Span(attempt.number, kind, step, began, ended)
        began = ended


def _marked(spans: Sequence[Span], saved: float) -> list[Span]:
    """The spans, with steps and evaluations marked as lost that were repeated later or are after step
    `saved`."""
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
    """Step from which the run would resume; infinite while it trains."""
    if not attempts or attempts[-1].runs:
        return float("inf")
    return next((attempt.saved[-1] for attempt in reversed(attempts) if attempt.saved), 0)


def seconds_by_kind(spans: Iterable[Span]) -> dict[str, float]:
    """Seconds of each kind, including those with none."""
    seconds = dict.fromkeys(KINDS, 0.0)
    for span in spans:
        seconds[span.kind] += span.seconds
    return seconds


def conclusion(spans: Sequence[Span]) -> str:
    """Sentence with the goodput and the largest other share."""
    seconds = seconds_by_kind(spans)
    total = sum(seconds.values())
    worst = max((kind for kind in KINDS if kind != PRODUCTIVE), key=lambda kind: seconds[kind])
    return (
        f"goodput {seconds[PRODUCTIVE] / total:.1%} of {describe_duration(total)}; "
        f"largest other share: {worst}, {seconds[worst] / total:.1%}"
    )
