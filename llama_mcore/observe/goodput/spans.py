"""Where the time of a run went, second by second: productive steps, lost steps, saving, evaluating,
restarting, and the time between its lives. Read from RUN_DIR/timeline.jsonl, and from lives.jsonl how lives
ended; report.py prints it."""

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import orjson

from llama_mcore.errors import DataError, MissingInputError, Problem, input_problem
from llama_mcore.observe.goodput.attempts import EndedLife, read_ended_lives
from llama_mcore.observe.goodput.timeline import TIMELINE_FILE
from llama_mcore.observe.line_file import read_lines
from llama_mcore.observe.metrics import describe_duration
from llama_mcore.observe.phases import Phase

STALE_S = 60.0
"""A life whose lease was not touched for so long is over; as in checkpoint/run_lock.py."""
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

    life: int
    kind: str
    step: int
    began: float
    ended: float

    @property
    def seconds(self) -> float:
        return self.ended - self.began


@dataclass
class Life:
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
    """Of the life among all, from 1."""

    @property
    def took_over(self) -> float:
        """When it came to hold the run, which is when its first line says that it did something."""
        return self.entries[0][0] if self.entries else self.began

    @property
    def runs(self) -> bool:
        """It was not noted as over, and its lease was touched lately."""
        return self.left is None and time.time() - self.ended < STALE_S


def read_lives(run_dir: Path) -> list[Life]:
    """All lives in the order of their beginnings. Lines that a kill or a full disk cut are passed over.

    Raises MissingInputError where there is no run, DataError where its files cannot be read.
    """
    timeline, noted = run_dir / TIMELINE_FILE, read_ended_lives(run_dir)
    lives: list[Life] = []
    try:
        for line in read_lines(timeline):
            with suppress(LookupError, TypeError, ValueError, OverflowError):
                _add_row(lives, orjson.loads(line))
    except FileNotFoundError:  # a run may end before it has one
        if not noted:
            bound, remedy = f"has no {TIMELINE_FILE}", "give a run's folder"
            raise MissingInputError(Problem("RUN_DIR", run_dir, bound, remedy)) from None
    except OSError as error:
        remedy = "give a run's folder that you may read"
        raise DataError(input_problem("timeline", timeline, remedy, error)) from None
    _add_ends(lives, noted)
    for number, life in enumerate(lives, start=1):
        life.number = number
        life.ended = max(life.ended, life.began)
        if life.left is None:
            life.ended = max(life.ended, _last_sign(run_dir, life))
    return lives


def _add_row(lives: list[Life], row: object) -> None:
    if not isinstance(row, dict):
        raise TypeError
    if "life" in row:
        life = Life(int(row["life"]), _time(row["began"]), str(row["job"]), int(row["ranks"]))
        lives.insert(_place(lives, life), life)
    else:
        _add(_writer(lives, row), row)


def _time(seconds: Any) -> float:
    """Raises ValueError for what no clock says."""
    if not 0 <= float(seconds) < _END_OF_TIME:
        raise ValueError
    return float(seconds)


def _place(lives: Sequence[Life], life: Life) -> int:
    """Before those that took the run over from it and yet came to write first. A clock alone is not believed,
    nor is a lease: their numbers begin anew where somebody deleted the folder."""
    place = len(lives)
    while place and lives[place - 1].lease > life.lease and lives[place - 1].began > life.began:
        place -= 1
    return place


def _writer(lives: Sequence[Life], row: dict[str, Any]) -> Life:
    """Whose line it is: the newest life's, if it is of a version that did not say. Raises LookupError."""
    for life in reversed(lives):
        if row.get("of", life.lease) == life.lease:
            return life
    raise LookupError


def _add(life: Life, row: dict[str, Any]) -> None:
    when = _time(row["t"])
    if "phase" in row:
        life.entries.append((when, _KIND_OF_PHASE[row["phase"]], int(row["step"])))
    elif "saved" in row:
        life.saved.append(int(row["saved"]))
    else:
        life.left = int(row["left"])
    life.ended = max(life.ended, when)


def _add_ends(lives: list[Life], noted: Sequence[EndedLife]) -> None:
    """Give lives the ends that their supervisors noted, and put those in that never came to a timeline."""
    known = {life.began: life for life in lives}
    place = 0
    for number, end in enumerate(noted):
        life = known.get(end.began)
        if life is None:
            # Before the next that is known, also where a clock ran ahead.
            following = [known[later.began] for later in noted[number:] if later.began in known]
            limit = min(map(lives.index, following), default=len(lives))
            while place < limit and lives[place].began < end.began:
                place += 1
            life = Life(0, end.began, end.job, end.ranks)
            lives.insert(place, life)
        life.left = end.exit_code
        life.ended = max(life.ended, end.ended)
        place = lives.index(life) + 1


def _last_sign(run_dir: Path, life: Life) -> float:
    """When a killed life was seen last: its lease is touched every few seconds, and stays behind."""
    try:
        return (run_dir / "lease" / f"{life.lease:08d}.json").stat().st_mtime
    except OSError:
        return 0.0


def spans_of(lives: Sequence[Life]) -> list[Span]:
    """The time from the first beginning to the last end, without a gap or an overlap."""
    spans: list[Span] = []
    for i, life in enumerate(lives):
        if spans:
            spans.append(Span(life.number, DOWN, 0, spans[-1].ended, max(spans[-1].ended, life.began)))
        spans += _spans_of_life(life, spans[-1].ended if spans else life.began, _taken_over(lives, i))
    return [span for span in _marked(spans, _last_saved(lives)) if span.seconds > 0]


def _taken_over(lives: Sequence[Life], i: int) -> float:
    """When the next life took the run from life `i`, whose later time counts for nothing."""
    following = next((life.took_over for life in lives[i + 1 :] if life.lease), float("inf"))
    return following if following > lives[i].began else float("inf")  # a clock was set back


def _spans_of_life(life: Life, began: float, not_after: float) -> Iterator[Span]:
    """From `began` on, also where a clock says less: no time is counted twice."""
    kinds = [(_KIND_OF_PHASE[Phase.START], 0), *((kind, step) for _, kind, step in life.entries)]
    ends = [*(entry[0] for entry in life.entries), life.ended]
    for (kind, step), end in zip(kinds, ends, strict=True):
        ended = max(began, min(end, not_after))
        yield Span(life.number, kind, step, began, ended)
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


def _last_saved(lives: Sequence[Life]) -> float:
    """The step from which the run would go on; of one that trains, its own is."""
    if not lives or lives[-1].runs:
        return float("inf")
    return next((life.saved[-1] for life in reversed(lives) if life.saved), 0)


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
