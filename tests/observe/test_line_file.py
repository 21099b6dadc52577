"""llama_mcore.observe.line_file: lines are read one at a time, and nothing but a file is read or written."""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from llama_mcore.observe import line_file
from llama_mcore.observe.line_file import append, ends_torn, json_line, open_to_append, read_lines


def test_whole_lines_come_back_in_order(tmp_path: Path) -> None:
    (tmp_path / "lines").write_bytes(b"1\n\n22\r\n333")
    assert list(read_lines(tmp_path / "lines")) == [b"1", b"", b"22\r"]


def test_a_line_without_an_end_is_not_read_into_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(line_file, "LONGEST", 1000)
    (tmp_path / "lines").write_bytes(b"1\n" + b"x" * 999 + b"\n")
    assert len(list(read_lines(tmp_path / "lines"))) == 2
    os.truncate(tmp_path / "lines", 1 << 20)
    lines = read_lines(tmp_path / "lines")
    assert [next(lines), len(next(lines))] == [b"1", 999]
    with pytest.raises(OSError, match="line 3 is longer than 1,000 bytes"):
        next(lines)


IN_THE_WAY: dict[str, Callable[[Path], object]] = {
    "pipe": os.mkfifo,
    "folder": Path.mkdir,
    "endless": lambda path: path.symlink_to("/dev/zero"),
    "nowhere": lambda path: path.symlink_to(path.parent / "nowhere/at/all"),
    "circle": lambda path: path.symlink_to(path.name),
}


@pytest.mark.parametrize("make", IN_THE_WAY.values(), ids=list(IN_THE_WAY))
def test_what_is_no_file_is_neither_read_nor_written(tmp_path: Path, make: Callable[[Path], object]) -> None:
    make(tmp_path / "lines")
    open_files = os.listdir("/proc/self/fd")
    with pytest.raises(OSError):
        list(read_lines(tmp_path / "lines"))
    with pytest.raises(OSError):
        open_to_append(tmp_path / "lines")
    assert os.listdir("/proc/self/fd") == open_files


def test_what_is_added_comes_last(tmp_path: Path) -> None:
    for torn, line in [(False, b"1\n2"), (True, b"\n3\n"), (False, b"4\n")]:
        with open_to_append(tmp_path / "lines") as file:
            assert ends_torn(file) is torn
            append(file, line)
    assert list(read_lines(tmp_path / "lines")) == [b"1", b"2", b"3", b"4"]


def test_a_json_line_has_null_for_numbers_that_are_not_finite() -> None:
    line = json_line(
        {"loss": math.nan, "valid": {"web": {"loss": math.inf}}, "ranks": [{"times": -math.inf}], "t": 0.1}
    )
    assert line.endswith(b"\n")
    assert json.loads(line) == {
        "loss": None,
        "valid": {"web": {"loss": None}},
        "ranks": [{"times": None}],
        "t": 0.1,
    }
