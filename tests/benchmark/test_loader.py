"""`loader`: what it measures is what a run does, and its bars."""

from pathlib import Path

import numpy as np
import pytest

from llama_mcore.benchmark.loader import (
    BARS,
    FAR,
    FAR_START,
    FILES,
    PLANNED_WINDOWS,
    RANDOM,
    START,
    TABLE_1,
    WHOLE,
    generated_samples,
    locate,
    measure,
    summarize,
    windows_of_files,
)

SECONDS = {RANDOM: [0.5, 0.25], WHOLE: [2.0, 1.0], "order": [0.5], START: [0.03, 0.02], FAR_START: [0.1]}


def test_it_runs_and_says_where_time_goes() -> None:
    result = measure(rounds=1, tokens=600_000, batches=3)
    assert {bar.quantity for bar in BARS} == set(result.quantities)
    assert all(value > 0 for value in result.quantities.values())
    assert 0 < result.measured["start_bytes"] < 2**20


def test_sources_are_read_in_the_shares_of_table_1(tmp_path: Path) -> None:
    samples = generated_samples(tmp_path, 20_000_000)
    numbers, _ = samples.segment.windows_at(np.arange(1000))
    shares = np.bincount(numbers, minlength=len(TABLE_1)) / 1000
    assert shares == pytest.approx([share / 1000 for share, _ in TABLE_1.values()], abs=0.003)


def test_the_order_is_that_of_a_trillion_tokens_in_a_thousand_files() -> None:
    files = list(windows_of_files())
    assert sum(map(len, files)) == FILES
    read = sum(sum(part) * epochs for part, (_, epochs) in zip(files, TABLE_1.values(), strict=True))
    assert read == pytest.approx(PLANNED_WINDOWS)
    part, window = locate(files, FAR, 0)
    assert 0 <= part < FILES
    assert window > 0


def test_the_best_round_counts() -> None:
    result = summarize(1000, SECONDS, memory=2048, others=0.0)
    assert result.held
    assert result.quantities == pytest.approx({RANDOM: 65.536, WHOLE: 16.384, START: 20, FAR_START: 100})
    assert result.notes[0].startswith("a micro-batch takes 1000 us: reading 250, its windows 500, ")
    assert "handing it to another thread 250" in result.notes[0]


@pytest.mark.parametrize(
    ("quantity", "seconds"), [(WHOLE, 2.2), (RANDOM, 2.2), (START, 0.11), (FAR_START, 0.11)]
)
def test_each_bar_can_be_missed(quantity: str, seconds: float) -> None:
    assert not summarize(1000, SECONDS | {quantity: [seconds]}, memory=2048, others=0.0).held
