"""Plan of the windows that a run reads, and ledger of those it has read: both follow from a position.

A plan says for each source how many windows it has, its share of the samples and its cap, the windows that
may be read of it over the whole run. The sample at a position belongs to a source (mixture.py), and the j-th
sample of a source reads the j-th window of its order (sample_order.py). So the windows consumed after any
number of samples can be computed: by the run, when it resumes, and by `audit-data` from outside.

A run has one segment until its data is changed on purpose. Then a new segment begins, in which a source whose
content is the same goes on where it was.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from llama_mcore.config.section import Section
from llama_mcore.data.config import SourceConfig
from llama_mcore.data.mixture import Mixture
from llama_mcore.data.sample_order import source_seed, windows_at
from llama_mcore.data.windows import WindowDataset
from llama_mcore.errors import DataError, Problem


class SourcePlan(Section):
    name: str
    content_id: str
    num_windows: int
    share: int
    """Weight relative to the other sources' shares; with `epochs` it is the planned number of windows."""
    cap: int
    """Windows that the run may read of it, each counted every time."""
    first: int = 0
    """Windows that earlier segments have read of it."""


class Segment(Section):
    """Plan of a run from its sample `start_sample` on."""

    start_sample: int = 0
    seed: int
    seq_length: int
    tokenizer_sha256: str | None = None
    """SHA-256 of the tokenizer that the data was made with, if known."""
    vocab_size: int | None = None
    """Number of tokens of that tokenizer."""
    sources: tuple[SourcePlan, ...]

    def used(self, position: int) -> dict[str, int]:
        """Windows read of each source after `position` samples of the run."""
        counts = self._mixture().counts(position - self.start_sample)
        return {source.name: source.first + count for source, count in zip(self.sources, counts, strict=True)}

    def windows_at(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Source number and window in that source, for each position of the run."""
        numbers, windows = self._mixture().sources_at(positions - self.start_sample)
        for number, source in enumerate(self.sources):
            here = numbers == number
            windows[here] = self.windows_of(source, windows[here] + source.first)
        return numbers, windows

    def windows_of(self, source: SourcePlan, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Windows that the samples `indices` of a source read."""
        return windows_at(indices, source.num_windows, source_seed(self.seed, source.name))

    def _mixture(self) -> Mixture:
        return Mixture(tuple(source.share for source in self.sources))


def plan_segment(
    sources: Mapping[str, SourceConfig],
    datasets: Mapping[str, WindowDataset],
    seed: int,
    seq_length: int,
    tokenizer_sha256: str | None = None,
) -> Segment:
    """The plan of a new run. Raises ConfigError for a share too small to plan for."""
    shares = _shares(sources, datasets)
    plans = tuple(
        SourcePlan(
            name=name,
            content_id=datasets[name].content_id,
            num_windows=datasets[name].num_windows,
            share=shares[name],
            cap=_windows(source.epochs or source.max_epochs, datasets[name]),
        )
        for name, source in sources.items()
    )
    segment = Segment(
        seed=seed,
        seq_length=seq_length,
        tokenizer_sha256=tokenizer_sha256,
        vocab_size=max((datasets[name].tokenizer_vocab_size for name in sources), default=0) or None,
        sources=plans,
    )
    segment.used(0)
    return segment


def _shares(sources: Mapping[str, SourceConfig], datasets: Mapping[str, WindowDataset]) -> dict[str, int]:
    """Windows to read, if sources have epochs; their weights scaled to integers, if they have weights."""
    if all(source.weight is None for source in sources.values()):
        return {
            name: max(1, _windows(source.epochs or 1, datasets[name])) for name, source in sources.items()
        }
    weights = {name: Fraction(str(source.weight)) for name, source in sources.items()}
    scale = math.lcm(*(weight.denominator for weight in weights.values()))
    return {name: int(weight * scale) for name, weight in weights.items()}


def _windows(epochs: float, dataset: WindowDataset) -> int:
    # As written: 1.1 means eleven tenths, not the nearest binary fraction.
    return int(Fraction(str(epochs)) * dataset.num_windows)


def check_caps(segment: Segment, end: int) -> None:
    """Raise DataError, with the table of the plan, if a run of `end` samples would read more than planned."""
    used = segment.used(end)
    over = [source for source in segment.sources if used[source.name] > source.cap]
    if not over:
        return
    longest = segment.start_sample + min(
        max(0, source.cap - source.first) * sum(s.share for s in segment.sources) // source.share
        for source in segment.sources
    )
    remedy = f"plan more epochs, give more text, or end the run by sample {longest:,}"
    problems = [
        Problem(
            f"source {source.name}",
            f"{used[source.name]:,} windows",
            f"the run of {end:,} samples would read more than the {source.cap:,} planned "
            f"({source.cap / source.num_windows:.2f} epochs)",
            remedy,
        )
        for source in over
    ]
    problems[-1] = replace(problems[-1], remedy=f"{remedy}\n{plan_table(segment, end)}")
    raise DataError(problems)


def plan_table(segment: Segment, end: int) -> str:
    """Planned tokens, available tokens and epochs of each source, for a run of `end` samples."""
    used, length = segment.used(end), segment.seq_length
    rows = [("source", "tokens", "share", "available", "epochs", "at most")]
    for source in segment.sources:
        windows = used[source.name]
        rows.append(
            (
                source.name,
                f"{windows * length:,}",
                f"{windows / max(1, sum(used.values())):.2%}",
                f"{source.num_windows * length:,}",
                f"{windows / source.num_windows:.2f}",
                f"{source.cap / source.num_windows:.2f}",
            )
        )
    return format_table(rows)


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """Text table: the first column aligned left, the others right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def differences(saved: Segment, planned: Segment) -> list[Problem]:
    """Differences between the data of a resumed run and that of its checkpoint."""
    problems = []
    for field, name in (("seed", "run.seed"), ("seq_length", "model.seq_length")):
        before, now = getattr(saved, field), getattr(planned, field)
        if before != now:
            problems.append(Problem(name, now, f"was {before} in the checkpoint"))
    before, now = saved.tokenizer_sha256, planned.tokenizer_sha256
    if before and now and before != now:
        problems.append(Problem("tokenizer of the data", now, f"was {before} in the checkpoint"))
    old = {source.name: source for source in saved.sources}
    new = {source.name: source for source in planned.sources}
    problems += [Problem("source", name, "is not in the checkpoint") for name in new if name not in old]
    problems += [
        Problem("source", name, "is missing; the checkpoint has it") for name in old if name not in new
    ]
    for name in new.keys() & old.keys():
        problems += _source_differences(old[name], new[name])
    if not problems and list(old) != list(new):
        problems.append(Problem("data.sources", ", ".join(new), f"was {', '.join(old)} in the checkpoint"))
    return problems


def _source_differences(saved: SourcePlan, planned: SourcePlan) -> list[Problem]:
    fields = {"content_id": "content", "share": "share", "cap": "most windows to read"}
    return [
        Problem(f"source {saved.name}: {meaning}", now, f"was {before} in the checkpoint")
        for field, meaning in fields.items()
        if (before := getattr(saved, field)) != (now := getattr(planned, field))
    ]


def continued(
    segments: Sequence[Segment], planned: Segment, position: int, accept_change: bool
) -> tuple[Segment, ...]:
    """The segments of a run that resumes at `position`.

    Raises DataError with every difference between its data and the last segment's, unless the change is
    accepted: then a new segment begins, in which a source of the same name and content goes on.
    """
    last = segments[-1]
    problems = differences(last, planned)
    if not problems:
        return tuple(segments)
    if not accept_change:
        remedy = "restore it, or give --accept-data-change to go on with other data and record the change"
        raise DataError([replace(problem, remedy=remedy) for problem in problems])
    used = last.used(position)
    kept = {source.name: source.content_id for source in last.sources}
    sources = tuple(
        source.model_copy(
            update={"first": used[source.name] if kept.get(source.name) == source.content_id else 0}
        )
        for source in planned.sources
    )
    return *segments, planned.model_copy(update={"start_sample": position, "sources": sources})
