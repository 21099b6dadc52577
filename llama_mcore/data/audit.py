"""Audit of a run's data: its plan, followed window by window, against its ledger."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from llama_mcore.data.data_plan import Segment, SourcePlan, format_table
from llama_mcore.errors import Problem

CHUNK = 1 << 20
FIX_LINES = "restore metrics.jsonl, or repeat the steps from an earlier checkpoint: --resume"


@dataclass(frozen=True)
class SourceUse:
    """Windows that a run has read of one source, as long as its content was the same."""

    plan: SourcePlan
    reads: int
    """Windows read, each counted every time."""
    never: int
    """Windows not read yet."""
    most: int
    """Reads of the window that was read most often."""

    @property
    def allowed(self) -> int:
        """Reads of one window that the plan allows."""
        return -(-self.plan.cap // self.plan.num_windows)


def count_uses(
    segments: Sequence[Segment], position: int, advance: Callable[[int], None] = lambda windows: None
) -> list[SourceUse]:
    """Follow the plan to `position` samples and count how often each window is read.

    Memory: two bytes for each window of one source at a time. `advance` is called with the number of windows
    counted since the last call.
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
    reads, never = int(uses.sum(dtype=np.int64)), int((uses == 0).sum())
    return SourceUse(plan, reads, never, int(uses.max(initial=0)))


def check_uses(uses: Iterable[SourceUse]) -> list[Problem]:
    """Problems of windows, and of whole sources, that were read more often than planned."""
    problems = []
    remedy = "the checkpoint does not follow its plan: go back to an older one, or start from scratch"
    for use in uses:
        name = f"source {use.plan.name}"
        if use.most > use.allowed:
            reason = f"the plan allows {use.allowed}"
            problems.append(Problem(name, f"one window read {use.most} times", reason, remedy))
        if use.reads > use.plan.cap:
            reason = f"the plan allows {use.plan.cap:,}"
            problems.append(Problem(name, f"{use.reads:,} windows read", reason, remedy))
    return problems


class LedgerLine(Protocol):
    """The ledger's entry for a step."""

    @property
    def step(self) -> int: ...
    @property
    def tokens(self) -> int: ...
    @property
    def windows(self) -> dict[str, int]: ...


def check_ledger(segments: Sequence[Segment], lines: Iterable[LedgerLine]) -> list[Problem]:
    """Differences between the ledger, in the lines of metrics.jsonl, and the plan; at most one of each kind.

    Also finds tokens that were lost or counted twice between two lines.
    """
    problems: dict[str, Problem] = {}
    before = 0
    for line in lines:
        step, tokens = line.step, line.tokens
        position, rest = divmod(tokens, segments[-1].seq_length)
        begun = [segment for segment in segments if segment.start_sample < position] or segments[:1]
        expected = begun[-1].used(position)
        if rest or tokens <= before:
            reason = f"must be whole sequences, and more than the {before:,} of the previous step"
            problems.setdefault("tokens", Problem(f"step {step}: tokens", f"{tokens:,}", reason, FIX_LINES))
        if line.windows != expected:
            reason = f"the plan gives {expected}"
            problems.setdefault("windows", Problem(f"step {step}: windows", line.windows, reason, FIX_LINES))
        before = tokens
    return list(problems.values())


def use_table(segments: Sequence[Segment], uses: Sequence[SourceUse]) -> str:
    """Table of plan and use, a row for each source."""
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
