"""llama_mcore.observe.metrics_file: which lines count, and which steps are missing."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_mcore.errors import DataError, MissingInputError
from llama_mcore.observe.line_file import json_line
from llama_mcore.observe.metrics_file import (
    METRICS_FILE,
    Key,
    Row,
    as_ranges,
    counting,
    describe_steps,
    drop_steps_after,
    last_attempt,
    missing_steps,
    read_metrics,
)
from tests.support.errors import refused


def keys(*lines: tuple[int, int]) -> list[Key]:
    """Keys of lines given as step and attempt."""
    return [Key(step, attempt, False) for step, attempt in lines]


def written(folder: Path, lines: list[Key]) -> Path:
    rows = [{"step": key.step, "attempt": key.attempt} for key in lines]
    path = folder / METRICS_FILE
    path.write_bytes(b"".join(json_line(row) for row in rows))
    return path


@pytest.mark.parametrize(
    ("lines", "count"),
    [
        ([(1, 1), (2, 1), (3, 2)], [(1, 1), (2, 1), (3, 2)]),
        # stopped in step 3, and continued when another was in step 4: its late lines come between
        ([(1, 1), (2, 1), (3, 2), (3, 1), (4, 1), (5, 1), (4, 2)], [(1, 1), (2, 1), (3, 2), (4, 2)]),
        # the other one had gone back before what the first had done
        ([(1, 1), (2, 1), (3, 1), (2, 2)], [(1, 1), (2, 2)]),
        ([(1, 1), (2, 1), (3, 2), (4, 2), (2, 3)], [(1, 1), (2, 3)]),
        ([(1, 1), (1, 1)], [(1, 1)]),
        ([], []),
    ],
)
def test_an_attempt_counts_from_its_first_step_on(
    tmp_path: Path, lines: list[tuple[int, int]], count: list[tuple[int, int]]
) -> None:
    found = keys(*lines)
    assert [found[place] for place in counting(found)] == keys(*count)
    path = written(tmp_path, found)
    assert [(row.step, row.attempt) for row in read_metrics(path, Row)] == count
    assert drop_steps_after(path, 9) == keys(*count)
    assert read_metrics(path, Row) == [Row(step=step, attempt=attempt) for step, attempt in count]


def test_of_an_attempts_lines_of_a_step_the_last_counts() -> None:
    assert counting(keys((1, 1), (2, 1), (2, 1), (1, 1))) == [3, 2]


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 4))))
def test_no_step_counts_twice_and_no_newer_line_gives_way(lines: list[tuple[int, int]]) -> None:
    count = [lines[place] for place in counting(keys(*lines))]
    steps = [step for step, _ in count]
    assert steps == sorted(set(steps))
    for step, attempt in lines:
        newer = [first for first, other in lines if other > attempt and first <= step]
        assert ((step, attempt) in count) == (not newer)


@pytest.mark.parametrize(
    ("steps", "last", "missing"),
    [
        ([1, 2, 3], 3, []),
        ([1, 2, 3, 4], 3, []),
        ([], 0, []),
        ([], 3, [(1, 3)]),
        ([3, 4, 8], 9, [(1, 2), (5, 7), (9, 9)]),
        ([1, 4], 2, [(2, 3)]),
    ],
)
def test_missing_steps(steps: list[int], last: int, missing: list[tuple[int, int]]) -> None:
    assert missing_steps(keys(*[(step, 1) for step in steps]), last) == missing


def test_nothing_before_a_checkpoint_of_another_folder_is_missing() -> None:
    lines = [Key(2, 1, False), Key(6, 2, True), Key(7, 2, False), Key(9, 2, False)]
    assert missing_steps(lines, 9) == [(8, 8)]


def test_steps_in_words() -> None:
    assert as_ranges([5, 3, 4, 9, 4]) == [(3, 5), (9, 9)]
    assert describe_steps([(1, 1), (3, 5), (1000, 2000)]) == "1, 3 to 5, 1,000 to 2,000"
    assert describe_steps([(step, step) for step in range(1, 24, 2)]).endswith("17, 19, 2 more ranges")


def test_numbers_go_on_after_the_highest(tmp_path: Path) -> None:
    assert last_attempt(tmp_path / METRICS_FILE) == 0
    path = written(tmp_path, keys((1, 3), (2, 3), (3, 1)))
    path.write_bytes(path.read_bytes() + b"{\n")
    assert last_attempt(path) == 3


def test_a_line_still_being_written_is_left_out(tmp_path: Path) -> None:
    path = written(tmp_path, keys((1, 1), (2, 1)))
    path.write_bytes(path.read_bytes()[:-1])
    assert [row.step for row in read_metrics(path, Row)] == [1]


@pytest.mark.parametrize(
    "damage", [b"{oops", b"[1]", b"{}", b'{"step": "2"}', b'{"step": -1}', b'{"step": 1e99}', b"\x00\xff"]
)
def test_a_damaged_line_is_named(tmp_path: Path, damage: bytes) -> None:
    path = written(tmp_path, keys((1, 1)))
    path.write_bytes(path.read_bytes() + damage + b"\n")
    with refused(DataError, "metrics", f"{path}:2"):
        read_metrics(path, Row)
    assert drop_steps_after(path, 9) == keys((1, 1))
    assert [row.step for row in read_metrics(path, Row)] == [1]


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    with refused(MissingInputError, "metrics", tmp_path / METRICS_FILE):
        read_metrics(tmp_path / METRICS_FILE, Row)
    os.mkfifo(tmp_path / METRICS_FILE)
    with refused(DataError, "metrics", tmp_path / METRICS_FILE):
        read_metrics(tmp_path / METRICS_FILE, Row)
