"""The plan of a run and what follows from it: each window as often as planned, whatever the layout."""

from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_mcore.data.config import SourceConfig
from llama_mcore.data.data_plan import (
    Segment,
    SourcePlan,
    check_caps,
    continued,
    differences,
    plan_segment,
    plan_table,
)
from llama_mcore.data.windows import WindowDataset
from llama_mcore.errors import DataError
from tests.data.test_indexed_dataset import write
from tests.support.errors import refused

NAMES = "abcdefgh"


def segment(windows: list[int], epochs: list[int] | None = None, seed: int = 7, start: int = 0) -> Segment:
    times = epochs or [1] * len(windows)
    return Segment(
        start_sample=start,
        seed=seed,
        seq_length=8,
        sources=tuple(
            SourcePlan(name=name, content_id=f"id of {name}", num_windows=n, share=n * e, cap=n * e)
            for name, n, e in zip(NAMES, windows, times, strict=False)
        ),
    )


def read(plan: Segment, first: int, end: int) -> list[tuple[int, int]]:
    sources, windows = plan.windows_at(np.arange(first, end))
    return list(zip(sources.tolist(), windows.tolist(), strict=True))


WINDOWS = st.lists(st.integers(1, 60), min_size=1, max_size=6)


@settings(max_examples=40, deadline=None)
@given(WINDOWS, st.integers(1, 3))
def test_the_whole_plan_reads_every_window_once_an_epoch(windows: list[int], epochs: int) -> None:
    plan = segment(windows, [epochs] * len(windows))
    counts = Counter(read(plan, 0, epochs * sum(windows)))
    assert counts == {(s, w): epochs for s, n in enumerate(windows) for w in range(n)}


@settings(max_examples=30, deadline=None)
@given(WINDOWS, st.data())
def test_within_an_epoch_no_window_repeats(windows: list[int], data: st.DataObject) -> None:
    plan = segment(windows, [3] * len(windows))
    seen: dict[int, list[int]] = {}
    end = data.draw(st.integers(1, 3 * sum(windows)))
    for source, window in read(plan, 0, end):
        seen.setdefault(source, []).append(window)
    for source, order in seen.items():
        for first in range(0, len(order), windows[source]):
            epoch = order[first : first + windows[source]]
            assert len(set(epoch)) == len(epoch)


@settings(max_examples=30, deadline=None)
@given(WINDOWS, st.lists(st.integers(1, 50), min_size=1, max_size=8), st.integers(1, 4))
def test_the_order_does_not_depend_on_batches_ranks_or_resumes(
    windows: list[int], steps: list[int], ranks: int
) -> None:
    """Steps of changing size, each cut over ranks in blocks, read what one long pass reads."""
    plan = segment(windows, [9] * len(windows))
    pieces, position = [], 0
    for size in steps:
        bounds = np.linspace(position, position + size, ranks + 1).astype(int)
        for first, end in reversed(list(pairwise(bounds))):
            pieces.append((first, read(Segment.model_validate(plan.model_dump()), first, end)))
        position += size
    joined = [sample for _, part in sorted(pieces) for sample in part]
    assert joined == read(plan, 0, position)


def test_another_seed_gives_another_order() -> None:
    assert read(segment([50, 30]), 0, 40) != read(segment([50, 30], seed=8), 0, 40)


def test_a_source_keeps_its_order_when_others_join() -> None:
    def of_first(plan: Segment) -> list[int]:
        return [window for source, window in read(plan, 0, 80) if source == 0][:20]

    assert of_first(segment([50])) == of_first(segment([50, 30]))


@settings(max_examples=30, deadline=None)
@given(WINDOWS, st.integers(0, 300))
def test_the_ledger_counts_what_was_read(windows: list[int], position: int) -> None:
    plan = segment(windows, [9] * len(windows))
    counts = Counter(source for source, _ in read(plan, 0, position))
    assert plan.used(position) == {NAMES[s]: counts[s] for s in range(len(windows))}


@pytest.fixture
def datasets(tmp_path: Path) -> dict[str, WindowDataset]:
    """Sources of 20 and 10 windows."""
    write(tmp_path / "a", [list(range(41))])
    write(tmp_path / "b", [list(range(21))])
    return {name: WindowDataset(tmp_path / name, 2) for name in "ab"}


def test_epochs_give_shares_and_caps(datasets: dict[str, WindowDataset]) -> None:
    sources = {"a": SourceConfig(train="a", epochs=1.1), "b": SourceConfig(train="b", epochs=2.45)}
    plan = plan_segment(sources, datasets, seed=1, seq_length=2)
    assert [(source.share, source.cap) for source in plan.sources] == [(22, 22), (24, 24)]
    check_caps(plan, 46)
    with pytest.raises(DataError) as error:
        check_caps(plan, 47)
    remedy = error.value.problems[-1].remedy
    assert "sample 46" in remedy
    assert plan_table(plan, 47) in remedy


def test_weights_give_shares_and_max_epochs_caps(datasets: dict[str, WindowDataset]) -> None:
    sources = {
        "a": SourceConfig(train="a", weight=0.75),
        "b": SourceConfig(train="b", weight=0.25, max_epochs=0.5),
    }
    plan = plan_segment(sources, datasets, seed=1, seq_length=2)
    assert [(source.share, source.cap) for source in plan.sources] == [(3, 20), (1, 5)]
    check_caps(plan, 20)
    with refused(DataError, "source b", "6 windows") as error:
        check_caps(plan, 24)
    assert "5 planned (0.50 epochs)" in str(error.value)


def test_the_table_of_a_plan(datasets: dict[str, WindowDataset]) -> None:
    table = plan_table(segment([20, 10], [1, 2]), 20)
    assert table.splitlines() == [
        "source  tokens   share  available  epochs  at most",
        "a           80  50.00%        160    0.50     1.00",
        "b           80  50.00%         80    1.00     2.00",
    ]


def changed(plan: Segment, **fields: object) -> Segment:
    first = plan.sources[0].model_copy(update=fields)
    return plan.model_copy(update={"sources": (first, *plan.sources[1:])})


# What the problem is of, and the change.
CHANGES = {
    "seed": ("run.seed", lambda plan: plan.model_copy(update={"seed": 8})),
    "length": ("model.seq_length", lambda plan: plan.model_copy(update={"seq_length": 4})),
    "tokenizer": (
        "tokenizer of the data",
        lambda plan: plan.model_copy(update={"tokenizer_sha256": "other"}),
    ),
    "content": ("source a: content", lambda plan: changed(plan, content_id="other")),
    "share": ("source a: share", lambda plan: changed(plan, share=1)),
    "cap": ("source a: most windows to read", lambda plan: changed(plan, cap=1)),
    "new": ("source", lambda plan: changed(plan, name="new")),
    "gone": ("source", lambda plan: plan.model_copy(update={"sources": plan.sources[1:]})),
    "order": ("data.sources", lambda plan: plan.model_copy(update={"sources": plan.sources[::-1]})),
}


@pytest.mark.parametrize("change", CHANGES)
def test_resuming_with_other_data_is_refused(change: str) -> None:
    plan = segment([20, 10, 5]).model_copy(update={"tokenizer_sha256": "one"})
    field, changed_by = CHANGES[change]
    with refused(DataError, field) as error:
        continued([plan], changed_by(plan), 9, accept_change=False)
    assert "--accept-data-change" in error.value.problems[0].remedy
    assert continued([plan], plan, 9, accept_change=False) == (plan,)
    assert differences(plan, plan) == []


def test_an_accepted_change_is_recorded_and_what_stayed_goes_on() -> None:
    before = segment([20, 10])
    other = changed(segment([20, 10, 40]), content_id="new text", num_windows=30)
    segments = continued([before], other, 9, accept_change=True)
    assert segments[0] == before
    after = segments[1]
    assert after.start_sample == 9
    assert before.used(9) == {"a": 6, "b": 3}
    assert after.used(9) == {"a": 0, "b": 3, "c": 0}
    windows_of_b = [w for s, w in read(before, 0, 9) if s == 1]
    while len(windows_of_b) < 10:
        position = 9 + len(windows_of_b) * 20
        windows_of_b = [w for s, w in read(before, 0, 9) if s == 1] + [
            w for s, w in read(after, 9, position) if s == 1
        ]
    assert sorted(windows_of_b[:10]) == list(range(10))  # its first epoch, over both segments
