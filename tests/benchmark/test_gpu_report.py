"""llama_mcore.benchmark.gpu_report: parts that end well, fail, crash, hang or cannot run; what is written.

Parts are small programs that write lines themselves: an import of torch would take longer than the rest.
"""

import json
import os
import sys
from pathlib import Path

import psutil
import pytest

from llama_mcore.benchmark.gpu_report import (
    EXIT_FAILED,
    EXIT_NO_GPU,
    GPU,
    JSON,
    LINES,
    MACHINE,
    PAGE,
    Line,
    Outcome,
    Part,
    check,
    merged,
    page,
    read_report,
    run_part,
    run_parts,
    showing,
    tell,
)
from llama_mcore.errors import OutputError
from tests.support.errors import refused
from tests.support.world import wait_until

LONG_S, SHORT_S = 600.0, 8.0
"""Limits of parts that end by themselves, and of those that do not."""
TELL = f"""
import json, os, signal, subprocess, sys, time
def tell(name, status, why="", measured="", bar=""):
    line = dict(name=name, status=status, why=why, measured=measured, bar=bar)
    with open(os.environ[{LINES!r}], "a") as file:
        file.write(json.dumps(line) + "\\n")
"""
WELL = "tell('sums', 'begun'); tell('sums', 'run', measured='1.5', bar='at most 2'); print('quiet')"
FAILS = "tell('sums', 'run'); tell('norms', 'failed', 'too large'); print('the last words')"
EXITS = "tell('sums', 'begun'); print('the last words'); sys.exit(3)"
CRASHES = "tell('sums', 'run'); tell('norms', 'begun'); os.kill(os.getpid(), signal.SIGSEGV)"
HANGS = "tell('sums', 'run'); tell('norms', 'begun'); time.sleep(3600)"
UNPROVEN = "tell('sums', 'unproven', 'apex is not installed')"
SILENT = "pass"


def command(code: str) -> list[str]:
    return [sys.executable, "-S", "-c", TELL + code]


def outcome_of(code: str, folder: Path, limit_s: float = LONG_S) -> Outcome:
    return run_part(Part("one", "a part", limit_s, ("sums", "norms")), command(code), folder, limit_s)


def lines_of(outcome: Outcome) -> dict[str, tuple[str, str]]:
    return {line.name: (line.status, line.why) for line in outcome.lines}


@pytest.mark.process
@pytest.mark.parametrize(
    ("code", "status", "sums", "norms"),
    [
        (WELL, "run", ("run", ""), ("unproven", "the part ended before it")),
        (FAILS, "failed", ("run", ""), ("failed", "too large")),
        (
            EXITS,
            "failed",
            ("failed", "at work when the part ended with exit code 3"),
            ("unproven", "the part ended with exit code 3 before it"),
        ),
        (CRASHES, "failed", ("run", ""), ("failed", "at work when the part died by SIGSEGV")),
        (
            UNPROVEN,
            "unproven",
            ("unproven", "apex is not installed"),
            ("unproven", "the part ended before it"),
        ),
        (
            SILENT,
            "unproven",
            ("unproven", "the part ended before it"),
            ("unproven", "the part ended before it"),
        ),
    ],
)
def test_every_line_says_what_became_of_it(
    code: str, status: str, sums: tuple[str, str], norms: tuple[str, str], tmp_path: Path
) -> None:
    outcome = outcome_of(code, tmp_path)
    assert outcome.status == status
    assert lines_of(outcome) == {"sums": sums, "norms": norms}
    assert (outcome.output != []) == ("last words" in code)


@pytest.mark.process
@pytest.mark.wait
def test_a_part_that_hangs_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    child = f"[{sys.executable!r}, '-S', '-c', 'import time; time.sleep(3600)']"
    start = f"print(subprocess.Popen({child}, start_new_session=True).pid, flush=True);"
    outcome = outcome_of(start + HANGS, tmp_path, SHORT_S)
    status, why = lines_of(outcome)["norms"]
    assert status == "failed"
    assert f"took longer than {SHORT_S:.0f} s" in why
    assert lines_of(outcome)["sums"] == ("run", "")
    wait_until(lambda: is_gone(int(outcome.output[0])))


@pytest.mark.process
def test_what_a_part_leaves_behind_is_ended(tmp_path: Path) -> None:
    child = f"[{sys.executable!r}, '-S', '-c', 'import time; time.sleep(3600)']"
    outcome = outcome_of(f"print(subprocess.Popen({child}).pid, flush=True); sys.exit(1)", tmp_path)
    wait_until(lambda: is_gone(int(outcome.output[0])))


def is_gone(pid: int) -> bool:
    """Killed, though its parent may not have noticed."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.mark.process
def test_a_failure_that_no_line_tells_is_a_line_of_its_own(tmp_path: Path) -> None:
    outcome = outcome_of("sys.exit(2)", tmp_path)
    assert ("failed", "ended with exit code 2") in lines_of(outcome).values()


CARD = f"tell({GPU!r}, 'run', measured='a card'); tell('torch', 'run', measured='2.13')"
NO_CARD = f"tell({GPU!r}, 'unproven', 'torch is built for the CPU')"


def run_all(folder: Path, budget_s: float | None = None, **codes: str) -> int:
    """Parts by their names; `tests` is one that needs no GPU."""
    free = (MACHINE, "tests")
    parts = [
        Part(name, f"{name} is shown", LONG_S, (GPU,) * (name == MACHINE), name not in free) for name in codes
    ]
    return run_parts(parts, lambda part: command(codes[part.name]), folder, budget_s)


@pytest.mark.process
def test_a_part_that_crashes_hides_no_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_all(tmp_path, machine=CARD, first=CRASHES, second=WELL) == EXIT_FAILED
    report = read_report(tmp_path)
    assert [outcome.status for outcome in report.values()] == ["run", "failed", "run"]
    assert report["second"].machine == "GPU a card; torch 2.13"
    assert report["second"].date
    text = (tmp_path / PAGE).read_text()
    assert "5 lines: 4 run, 1 failed, 0 unproven" in text
    assert "1.5      | at most 2" in text
    assert "run      sums  1.5, at most 2" in capsys.readouterr().out


@pytest.mark.process
def test_what_is_done_is_written_before_the_next_part(tmp_path: Path) -> None:
    looks = f"tell('seen', 'run', measured=' '.join(json.load(open({str(tmp_path / JSON)!r}))))"
    assert run_all(tmp_path, machine=CARD, first=WELL, second=looks) == 0
    assert read_report(tmp_path)["second"].lines[0].measured == "machine first"


@pytest.mark.process
def test_without_a_gpu_each_line_says_so(tmp_path: Path) -> None:
    assert run_all(tmp_path, machine=NO_CARD, first=WELL, tests=UNPROVEN) == EXIT_NO_GPU
    report = read_report(tmp_path)
    assert [line.status for outcome in report.values() for line in outcome.lines] == ["unproven"] * 3
    assert report["first"].lines == [
        Line("first is shown", "unproven", "no GPU here: torch is built for the CPU")
    ]
    assert report["tests"].lines[0].why == "apex is not installed"
    assert not (tmp_path / "first.log").exists()


@pytest.mark.process
def test_what_says_nothing_of_the_gpu_has_none(tmp_path: Path) -> None:
    """A part without GPU information, as when torch cannot be imported."""
    assert run_all(tmp_path, machine="sys.exit(1)", first=WELL) == EXIT_FAILED
    assert "ended with exit code 1" in read_report(tmp_path)["first"].lines[0].why


@pytest.mark.process
def test_parts_add_up_in_one_folder(tmp_path: Path) -> None:
    run_all(tmp_path, machine=CARD, first=WELL)
    run_all(tmp_path, machine=CARD, second=FAILS)
    assert list(read_report(tmp_path)) == ["machine", "first", "second"]
    run_all(tmp_path, machine=CARD, second=WELL)
    assert read_report(tmp_path)["second"].status == "run"
    run_all(tmp_path, machine=NO_CARD, second=WELL)
    assert read_report(tmp_path)["second"].status == "run"


def test_what_shows_nothing_replaces_nothing() -> None:
    shown = Outcome("a part", lines=[Line("sums", "failed")])
    nothing = Outcome("a part", lines=[Line("sums", "unproven", "no GPU here")])
    assert merged({"one": shown}, "one", nothing) == {"one": shown}
    assert merged({"one": nothing}, "one", shown) == {"one": shown}


@pytest.mark.process
def test_a_part_without_time_is_not_begun(tmp_path: Path) -> None:
    assert run_all(tmp_path, budget_s=1e-9, machine=CARD) == EXIT_NO_GPU
    (line,) = read_report(tmp_path)[MACHINE].lines
    assert line.status == "unproven"
    assert "--part machine" in line.why


@pytest.mark.parametrize("content", ["", "[]", '{"one": {"lines": [{"name": "sums"}]}}'])
def test_another_file_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / JSON).write_text(content)
    with refused(OutputError, "--output", tmp_path):
        run_parts([], lambda part: [], tmp_path)
    assert (tmp_path / JSON).read_text() == content


def test_a_cell_is_one_cell() -> None:
    text = page({"one": Outcome("a part", lines=[Line("a|b", "failed", why="c|d")], output=["no | line"])})
    (row,) = (row for row in text.splitlines() if "a\\|b" in row)
    assert row.replace("\\|", "").count("|") == 6
    assert "    no | line" in text


def test_cases_that_say_the_same_are_one_row() -> None:
    skipped = [Line(f"test_b[{n}]", "unproven", "needs a GPU") for n in range(3)]
    failed = [Line(f"test_b[{n}]", "failed", "1 > 2") for n in (3, 4)]
    lines = [Line("test_a[1]", "run"), *skipped, *failed, Line("test_c[1]", "run", measured="2")]
    rows = [
        row.split("|")[1:3]
        for row in page({"one": Outcome("a part", lines=lines)}).splitlines()
        if "test" in row
    ]
    assert [[cell.strip() for cell in row] for row in rows] == [
        ["run", "test_a[1]"],
        ["unproven", "test_b, 3 cases"],
        ["failed", "test_b[3]"],
        ["failed", "test_b[4]"],
        ["run", "test_c[1]"],
    ]


def told(path: Path) -> list[Line]:
    return [Line(**json.loads(row)) for row in path.read_text().splitlines()]


def test_a_block_tells_how_it_went(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LINES, str(tmp_path / "lines"))
    with showing("sums") as said:
        said["measured"] = "3"
        check(False, "more\nthan two")
    with showing("norms"):
        pass
    with pytest.raises(ZeroDivisionError), showing("products"):
        1 / 0  # noqa: B018
    assert told(tmp_path / "lines") == [
        Line("sums", "begun"),
        Line("sums", "failed", "more than two", "3"),
        Line("norms", "begun"),
        Line("norms", "run"),
        Line("products", "begun"),
    ]


def test_outside_a_part_a_line_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert LINES not in os.environ
    tell("sums", "run", measured="2", bar="at most 3")
    assert capsys.readouterr().out.split() == ["run", "sums", "2,", "at", "most", "3"]
