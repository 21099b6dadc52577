"""Proof of what a run has read: its plan is followed window by window and compared with its ledger."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from llama_mcore.data.data_plan import Segment, SourcePlan, format_table
from llama_mcore.errors import Problem

CHUNK = 1 << 20
FIX_LINES = "restore metrics.jsonl, or do the steps again from an earlier checkpoint: --resume"


@dataclass(frozen=True)
class SourceUse:
    """What a run has read of one content of one source."""

    plan: SourcePlan
    reads: int
    """Windows read, repeated ones counted each time."""
    never: int
    """Windows not read yet."""
    most: int
    """How often the most used window was read."""

    @property
    def allowed(self) -> int:
        """How often the plan lets a window be read."""
        return -(-self.plan.cap // self.plan.num_windows)


def count_uses(
    segments: Sequence[Segment], position: int, advance: Callable[[int], None] = lambda windows: None
) -> list[SourceUse]:
    """Follow the plan to `position` samples and count how often each window is read.

    Two bytes of memory for each window of one source at a time; `advance` is told how many windows were
    counted.
    """
    contents = {(s.name, s.content_id): s for segment in segments for s in segment.sources}
    return [_count(plan, segments, position, advance) for plan in contents.values()]


def _count(
    plan: SourcePlan, segments: Sequence[Segment], position: int, advance: Callable[[int], None]
) -> SourceUse:
    uses = np.zeros(plan.num_windows, dtype=np.uint16)
    for number, segment in enumerate(segments):
        ends_at = segments[number + 1].start_sample if number + 1 < len(segments) else position
        for source in segment.sources:
            if (source.name, source.content_id) == (plan.name, plan.content_id):
                last = segment.used(ends_at)[source.name]
                for first in range(source.first, last, CHUNK):
                    indices = np.arange(first, min(first + CHUNK, last))
                    np.add.at(uses, segment.windows_of(source, indices), 1)
                    advance(len(indices))
    return SourceUse(plan, int(uses.sum(dtype=np.int64)), int((uses == 0).sum()), _most(uses))


def _most(uses: NDArray[np.uint16]) -> int:
    return int(uses.max(initial=0))


def check_uses(uses: Iterable[SourceUse]) -> list[Problem]:
    """Where a window, or a source in all, was read more often than planned."""
    problems = []
    remedy = "the checkpoint is not of that plan: take an older one, or start from scratch"
    for use in uses:
        name = f"source {use.plan.name}"
        if use.most > use.allowed:
            reason = f"the plan allows {use.allowed}"
            problems.append(Problem(name, f"a window read {use.most} times", reason, remedy))
        if use.reads > use.plan.cap:
            reason = f"the plan allows {use.plan.cap:,}"
            problems.append(Problem(name, f"{use.reads:,} windows read", reason, remedy))
    return problems


class Line(Protocol):
    """What the ledger says of a step."""

    @property
    def step(self) -> int: ...
    @property
    def tokens(self) -> int: ...
    @property
    def windows(self) -> dict[str, int]: ...


def check_ledger(segments: Sequence[Segment], lines: Iterable[Line]) -> list[Problem]:
    """Where the ledger in the lines of metrics.jsonl is not what the plan gives at their positions, or
    tokens were lost or counted twice between two lines. At most one problem of each kind."""
    problems: dict[str, Problem] = {}
    before = 0
    for line in lines:
        step, tokens = line.step, line.tokens
        position, rest = divmod(tokens, segments[-1].seq_length)
        at_work = [segment for segment in segments if segment.start_sample < position] or segments[:1]
        expected = at_work[-1].used(position)
        if rest or tokens <= before:
            reason = f"must be whole sequences and more than the {before:,} of the step before"
            problems.setdefault("tokens", Problem(f"step {step}: tokens", f"{tokens:,}", reason, FIX_LINES))
        if line.windows != expected:
            reason = f"the plan gives {expected}"
            problems.setdefault("windows", Problem(f"step {step}: windows", line.windows, reason, FIX_LINES))
        before = tokens
    return list(problems.values())


def use_table(segments: Sequence[Segment], uses: Sequence[SourceUse]) -> str:
    """Plan against use, one row a source."""
    last = segments[-1]
    shares = {source.name: source.share / sum(s.share for s in last.sources) for source in last.sources}
    total = sum(use.reads for use in uses)
    rows = [("source", "planned share", "share", "tokens", "epochs", "at most", "most read", "never read")]
    for use in uses:
        plan = use.plan
        rows.append(
            (
                plan.name,
                f"{shares[plan.name]:.3%}" if plan in last.sources else "gone",
                f"{use.reads / max(1, total):.3%}",
                f"{use.reads * last.seq_length:,}",
                f"{use.reads / plan.num_windows:.3f}",
                f"{plan.cap / plan.num_windows:.3f}",
                f"{use.most} x",
                f"{use.never / plan.num_windows:.1%}",
            )
        )
    return format_table(rows)
