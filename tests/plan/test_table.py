"""llama_mcore.plan.table: plain in a pipe, with lines in a terminal."""

import io
import re

import pytest

from llama_mcore.plan.table import Grid, flops, show, whole

GRID = Grid("Two sizes", ["", "small", "large"], [["parameters", "1", "1,000"], ["tokens [b]", "20", "2"]])


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_plain_columns_are_aligned_without_lines_or_escapes() -> None:
    file = io.StringIO()
    show(["First.", GRID], file)
    lines = file.getvalue().splitlines()
    assert lines[0] == "First."
    assert "Two sizes" in lines[2]
    assert lines[3].split() == ["small", "large"]
    assert lines[4].split() == ["parameters", "1", "1,000"]
    assert lines[5].split()[:2] == ["tokens", "[b]"]  # no markup
    assert lines[4].rindex("0") == lines[5].rindex("2")
    assert file.getvalue().isascii()
    assert all(line == line.rstrip() for line in lines)


def test_a_long_line_is_not_wrapped_in_a_pipe() -> None:
    file = io.StringIO()
    show(["word " * 100], file)
    assert len(file.getvalue().splitlines()) == 1


def test_a_terminal_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "60")
    file = Terminal()
    show([GRID], file)
    assert "\u2500" in file.getvalue()


def test_a_terminal_breaks_sentences_between_words_and_no_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    command = "    " + "--option value " * 10
    file = Terminal()
    show(["word " * 40 + "\n" + command], file)
    *sentence, last = file.getvalue().rstrip("\n").splitlines()
    assert last == command
    assert len(sentence) == 3
    assert {word for line in sentence for word in line.split()} == {"word"}


def test_figures_are_whole_in_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "60")
    file = Terminal()
    show([Grid("Long", ["", *["figures of a kind"] * 4], [["a name " * 9, *["1,234,567"] * 4]])], file)
    assert file.getvalue().count("1,234,567") == 4
    plain = re.sub(r"\x1b\[[0-9;]*m", "", file.getvalue())
    assert max(map(len, plain.splitlines())) <= 60


def test_operations_and_whole_numbers() -> None:
    assert flops(5.756e23) == "5.76e23"
    assert [whole(n) for n in (1_022_362, 14.2, 6.94, 0.0123)] == ["1,022,362", "14", "6.9", "0.012"]
