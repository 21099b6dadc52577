"""llama_mcore.observe.goodput: every second of a run is accounted for, once."""

import errno
import json
import os
import random
import stat
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from llama_mcore.checkpoint import run_lock
from llama_mcore.errors import DataError, MissingInputError, OutputError, Problem
from llama_mcore.observe.goodput import spans as spans_module
from llama_mcore.observe.goodput.attempts import AttemptEnded, add_attempt
from llama_mcore.observe.goodput.report import show_goodput, to_dict
from llama_mcore.observe.goodput.spans import read_attempts, seconds_by_kind, spans_of
from llama_mcore.observe.goodput.timeline import TIMELINE_FILE, Timeline
from llama_mcore.observe.phases import Phase, Phases
from tests.observe.held import Held
from tests.support.errors import refused

# As earlier versions wrote them: only the first line says of which attempt it is.
# Begins at 1000; trains steps 1 to 3, of which 1 and 2 are saved; is killed in step 4, last seen at 1050.
KILLED = [
    {"attempt": 1, "began": 1000.0, "job": "7", "host": "n1", "ranks": 2},
    {"t": 1005.0, "phase": "setup", "step": 0},
    {"t": 1010.0, "phase": "train", "step": 1},
    {"t": 1012.0, "phase": "train", "step": 2},
    {"t": 1014.0, "phase": "evaluate", "step": 2},
    {"t": 1017.0, "phase": "save", "step": 2},
    {"t": 1018.0, "phase": "train", "step": 3},
    {"t": 1018.5, "saved": 2},
    {"t": 1020.0, "phase": "evaluate", "step": 3},
    {"t": 1021.0, "phase": "train", "step": 4},
]
# Goes on from step 2 at 1100, and finishes with step 3.
FINISHED = [
    {"attempt": 2, "began": 1100.0, "job": "7", "host": "n1", "ranks": 2},
    {"t": 1104.0, "phase": "setup", "step": 0},
    {"t": 1108.0, "phase": "train", "step": 3},
    {"t": 1110.0, "phase": "save", "step": 3},
    {"t": 1111.0, "saved": 3},
    {"t": 1111.5, "phase": "end", "step": 3},
    {"t": 1112.0, "left": 0},
]
# What the killed one wrote when it was thought dead, and its node was only cut off.
LATE = [
    {"of": 1, "t": 1102.0, "phase": "train", "step": 5},
    {"of": 1, "t": 1107.0, "phase": "save", "step": 5},
    {"of": 1, "t": 1111.25, "phase": "end", "step": 5},
    {"of": 1, "t": 1130.0, "left": 73},
]


def named(attempt: list[dict]) -> list[dict]:
    """The lines of an attempt as they are written now."""
    first, *others = attempt
    return [first, *({"of": first["attempt"], **row} for row in others)]


def write(run_dir: Path, rows: list[dict], tail: bytes = b"") -> Path:
    lines = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    (run_dir / TIMELINE_FILE).write_bytes(lines + tail)
    return run_dir


def test_every_second_has_its_kind(tmp_path: Path) -> None:
    write(tmp_path, KILLED + FINISHED)
    (tmp_path / "lease").mkdir()
    (tmp_path / "lease" / "00000001.json").touch()
    os.utime(tmp_path / "lease" / "00000001.json", (1050, 1050))
    attempts = read_attempts(tmp_path)
    spans = spans_of(attempts)
    assert seconds_by_kind(spans) == {
        "productive": 2 + 2 + 2,  # steps 1 and 2 of the first attempt, 3 of the second
        "lost": 2 + 1 + 29,  # step 3, its evaluation, and step 4 until the kill
        "saving": 1 + 1.5,
        "evaluation": 3,
        "restarting": 10 + 8,
        "ending": 0.5,
        "down": 50,
    }
    assert [attempt.left for attempt in attempts] == [None, 0]
    assert [attempt.saved for attempt in attempts] == [[2], [3]]


def test_without_its_lease_a_killed_attempt_ends_with_its_last_line(tmp_path: Path) -> None:
    spans = spans_of(read_attempts(write(tmp_path, KILLED + FINISHED)))
    seconds = seconds_by_kind(spans)
    assert (seconds["lost"], seconds["down"]) == (3, 79)
    assert sum(seconds.values()) == 112


@pytest.mark.parametrize("place", range(len(FINISHED) + 1))
def test_an_attempt_that_was_taken_over_counts_until_then(tmp_path: Path, place: int) -> None:
    """Wherever its late lines come among those of the next, which took the run when it began to set up."""
    killed, finished = named(KILLED), named(FINISHED)
    rows = [*killed, *finished[:place], *LATE, *finished[place:]]
    attempts = read_attempts(write(tmp_path, rows))
    assert [(attempt.lease, attempt.left, attempt.saved) for attempt in attempts] == [
        (1, 73, [2]),
        (2, 0, [3]),
    ]
    assert seconds_by_kind(spans_of(attempts)) == {
        "productive": 2 + 2 + 2,
        "lost": 2 + 1 + 81 + 2,  # step 3, its evaluation, step 4 until 1102, step 5 until 1104
        "saving": 1 + 1.5,
        "evaluation": 3,
        "restarting": 10 + 4,
        "ending": 0.5,
        "down": 0,
    }


def test_an_attempt_may_write_first_when_it_was_taken_over(tmp_path: Path) -> None:
    """The earlier one had not read its checkpoint when it was cut off."""
    rows = [*named(FINISHED), *named(KILLED)[:2], {"of": 1, "t": 1113.0, "left": 73}]
    attempts = read_attempts(write(tmp_path, rows))
    seconds = seconds_by_kind(spans_of(attempts))
    assert [attempt.lease for attempt in attempts] == [1, 2]
    assert (seconds["restarting"], seconds["productive"]) == (104 + 4, 2)
    assert sum(seconds.values()) == 112


def test_a_late_line_that_does_not_say_whose_it_is_shortens_no_attempt(tmp_path: Path) -> None:
    late = {"t": 1101.0, "phase": "train", "step": 5}
    spans = spans_of(read_attempts(write(tmp_path, [*KILLED, *FINISHED, late])))
    assert sum(span.seconds for span in spans) == 112


def test_numbers_may_start_from_scratch_where_the_lease_was_deleted(tmp_path: Path) -> None:
    second = named([{**FINISHED[0], "attempt": 1}, *FINISHED[1:]])
    attempts = read_attempts(write(tmp_path, named([{**KILLED[0], "attempt": 3}, *KILLED[1:]]) + second))
    assert [(attempt.began, attempt.saved) for attempt in attempts] == [(1000.0, [2]), (1100.0, [3])]


@given(
    st.lists(
        st.tuples(
            st.floats(0, 100, allow_nan=False),
            st.lists(st.tuples(st.sampled_from(list(Phase)), st.integers(0, 9), st.floats(0, 50))),
            st.booleans(),
        ),
        min_size=1,
    ),
    st.randoms(),
)
def test_the_kinds_always_add_up(
    tmp_path_factory: pytest.TempPathFactory, attempts: list, order: random.Random
) -> None:
    """The kinds add up even if clocks were set back between two attempts, or several wrote at once."""
    written: list[list[dict]] = []
    for number, (began, phases, left) in enumerate(attempts, start=1):
        rows: list[dict] = [{"attempt": number, "began": began, "job": "", "host": "", "ranks": 1}]
        now = began
        for phase, step, seconds in phases:
            rows.append({"t": now, "phase": phase, "step": step})
            now += seconds
        if left:
            rows.append({"t": now, "left": 0})
        written.append(named(rows))
    turns = [rows for rows in written for _ in rows]
    order.shuffle(turns)
    rows = [rows.pop(0) for rows in turns]
    spans = spans_of(read_attempts(write(tmp_path_factory.mktemp("run"), rows)))
    assert all(one.ended == other.began for one, other in pairwise(spans))
    if spans:
        whole = spans[-1].ended - spans[0].began
        assert sum(seconds_by_kind(spans).values()) == pytest.approx(whole, rel=1e-12)


@pytest.mark.parametrize(
    "damage",
    [
        *(b'{"t": 1200.0, "pha', b"\x00\xff\n", b'{"t": 1e308, "left": 0}\n', b'{"t": 1e400, "left": 0}\n'),
        b"[1]\n",
        b'{"t": "x", "left": 0}\n',
        b'{"left": 0}\n',
    ],
)
def test_a_damaged_line_is_passed_over(tmp_path: Path, damage: bytes) -> None:
    sound = to_dict(*_read(write(tmp_path, KILLED)))
    assert to_dict(*_read(write(tmp_path, KILLED, damage))) == sound


def _read(run_dir: Path) -> tuple:
    attempts = read_attempts(run_dir)
    return attempts, spans_of(attempts)


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    phases = Phases()
    with Timeline(tmp_path, Held(4), ranks=2, began=0.0) as timeline:
        phases.add(timeline)
        phases.enter(Phase.SETUP, 0)
        assert not list(tmp_path.iterdir())  # the folder is not yet known to be this run's
        phases.run_dir_ready()
        phases.enter(Phase.TRAIN, 1)
        phases.saved(1)
        timeline.exit_code = 75
    (attempt,) = read_attempts(tmp_path)
    assert (attempt.lease, attempt.began, attempt.ranks, attempt.left, attempt.saved) == (4, 0.0, 2, 75, [1])
    assert [(kind, step) for _, kind, step in attempt.entries] == [("restarting", 0), ("productive", 1)]
    first, *others = map(json.loads, (tmp_path / TIMELINE_FILE).read_text().splitlines())
    assert first["attempt"] == 4
    assert [row["of"] for row in others] == [4] * 4


@pytest.mark.parametrize(
    ("error", "exit_code"), [(OutputError(Problem("run.dir", "x", "is full")), 73), (ValueError(), 1)]
)
def test_an_attempt_that_fails_says_how(tmp_path: Path, error: Exception, exit_code: int) -> None:
    def attempt() -> None:
        with Timeline(tmp_path, Held(1), ranks=1, began=0.0) as timeline:
            timeline.run_dir_ready()
            raise error

    with pytest.raises(type(error)):
        attempt()
    assert read_attempts(tmp_path)[0].left == exit_code


def test_a_full_disk_costs_lines_and_nothing_else(
    caplog: pytest.LogCaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / TIMELINE_FILE).symlink_to("/dev/full")
    monkeypatch.setattr(stat, "S_ISREG", lambda mode: True)  # else it would not even be opened
    with Timeline(tmp_path, Held(1), ranks=1, began=0.0) as timeline:
        timeline.run_dir_ready()
        timeline.enter(Phase.TRAIN, 1)
    assert caplog.text.count("No space left on device") == caplog.text.count("timeline.jsonl") == 1


def test_an_attempt_that_lost_the_run_adds_nothing(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    lease = Held()
    with Timeline(tmp_path, lease, ranks=1, began=0.0) as timeline:
        timeline.run_dir_ready()
        timeline.enter(Phase.TRAIN, 1)
        before = (tmp_path / TIMELINE_FILE).read_bytes()
        lease.is_lost = True
        timeline.enter(Phase.EVALUATE, 1)
        timeline.saved(1)
    assert (tmp_path / TIMELINE_FILE).read_bytes() == before
    assert caplog.text.count("taken over by another job") == 1


def test_an_attempt_that_lost_the_run_before_it_had_begun_adds_nothing(tmp_path: Path) -> None:
    with Timeline(tmp_path, Held(is_lost=True), ranks=1, began=0.0) as timeline:
        timeline.run_dir_ready()
    assert not (tmp_path / TIMELINE_FILE).exists()


def test_the_command_prints_a_table_json_and_a_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, KILLED + FINISHED)
    show_goodput(tmp_path)
    lines = capsys.readouterr().out.splitlines()
    for part in ("5.4%", "1m52s", "down", "70.5%"):
        assert part in lines[0]
    assert [line.split()[0] for line in lines[1:]] == ["attempt", "1", "2", "total", "share"]
    assert lines[2].split()[-1] == "killed"
    assert lines[3].split()[-1] == "0"
    show_goodput(tmp_path, as_json=True, picture=tmp_path / "goodput.png")
    found = json.loads(capsys.readouterr().out)
    assert found["goodput"] == pytest.approx(6 / 112)
    assert found["attempts"][1]["seconds_by_kind"]["down"] == 79
    with Image.open(tmp_path / "goodput.png") as image:
        red, green, _ = np.moveaxis(np.asarray(image.convert("RGB")), -1, 0)
    assert ((green > 100) & (red < 100)).sum() > 100  # the bars of productive steps


def test_an_attempt_whose_lease_is_touched_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, KILLED)
    (tmp_path / "lease").mkdir()
    (tmp_path / "lease" / "00000001.json").touch()
    show_goodput(tmp_path)
    assert capsys.readouterr().out.splitlines()[2].split()[-1] == "runs"


def test_an_attempt_without_time_is_no_run_yet(tmp_path: Path) -> None:
    with refused(DataError, "timeline", tmp_path / TIMELINE_FILE, remedy=False):
        show_goodput(write(tmp_path, KILLED[:1]))


def note(run_dir: Path, began: float, ended: float, exit_code: int) -> None:
    facts = {"job": "7", "host": "n1", "ranks": 2, "asked": False, "saved": False, "step": 0}
    add_attempt(run_dir, AttemptEnded(began=began, ended=ended, exit_code=exit_code, **facts))


def test_a_killed_attempt_ends_when_its_supervisor_said_so(tmp_path: Path) -> None:
    write(tmp_path, KILLED + FINISHED)
    note(tmp_path, 1000.0, 1033.25, 137)
    attempts = read_attempts(tmp_path)
    seconds = seconds_by_kind(spans_of(attempts))
    assert [attempt.left for attempt in attempts] == [137, 0]
    assert seconds["lost"] == 2 + 1 + 12.25  # step 3, its evaluation, and step 4 until the kill
    assert seconds["down"] == 66.75
    assert sum(seconds.values()) == 112


def test_an_attempt_that_never_came_to_a_timeline_was_restarting(tmp_path: Path) -> None:
    """Three such attempts: one before all others, one between, one after."""
    write(tmp_path, KILLED + FINISHED)
    note(tmp_path, 990.0, 998.0, 1)
    note(tmp_path, 1060.0, 1075.0, 75)
    note(tmp_path, 1100.0, 1112.5, 0)
    note(tmp_path, 1120.0, 1121.0, 139)
    attempts = read_attempts(tmp_path)
    spans = spans_of(attempts)
    assert [(attempt.number, attempt.left) for attempt in attempts] == [
        (1, 1),
        (2, None),
        (3, 75),
        (4, 0),
        (5, 139),
    ]
    assert [attempt.lease for attempt in attempts] == [0, 1, 0, 2, 0]
    by_attempt = {
        attempt.number: seconds_by_kind(s for s in spans if s.attempt == attempt.number)
        for attempt in attempts
    }
    assert [by_attempt[number]["restarting"] for number in by_attempt] == [8, 10, 15, 8, 1]
    assert [by_attempt[number]["down"] for number in by_attempt] == [0, 2, 39, 25, 7.5]
    assert by_attempt[4]["ending"] == 1.0  # its supervisor left half a second after it
    assert sum(span.seconds for span in spans) == 1121 - 990


def test_a_clock_that_ran_ahead_counts_no_attempt_twice(tmp_path: Path) -> None:
    write(tmp_path, KILLED + FINISHED)
    note(tmp_path, 1000.0, 1021.0, 137)
    note(tmp_path, 9000.0, 9001.0, 1)
    note(tmp_path, 1100.0, 1112.0, 0)
    attempts = read_attempts(tmp_path)
    assert [(attempt.began, attempt.left) for attempt in attempts] == [
        (1000.0, 137),
        (9000.0, 1),
        (1100.0, 0),
    ]


def test_a_clock_that_was_set_back_takes_nothing_from_the_attempt_before(tmp_path: Path) -> None:
    first, *others = named(FINISHED)
    back = [{**first, "began": 600.0}, *({**row, "t": row["t"] - 500} for row in others)]
    attempts = read_attempts(write(tmp_path, named(KILLED) + back))
    seconds = seconds_by_kind(spans_of(attempts))
    assert [attempt.lease for attempt in attempts] == [1, 2]
    assert (seconds["productive"], seconds["saving"], sum(seconds.values())) == (2 + 2, 1, 21)


def test_a_start_that_never_held_the_run_takes_nothing_from_it(tmp_path: Path) -> None:
    """A start may be typed by mistake while the run is at work."""
    write(tmp_path, named(KILLED))
    note(tmp_path, 1011.0, 1013.0, 1)
    attempts = read_attempts(tmp_path)
    seconds = seconds_by_kind(spans_of(attempts))
    assert [attempt.lease for attempt in attempts] == [1, 0]
    assert (seconds["restarting"], sum(seconds.values())) == (10, 21)


def test_steps_that_no_checkpoint_has_are_lost_when_the_run_is_over(tmp_path: Path) -> None:
    """Step 3, its evaluation and step 4: the run would go on after step 2."""
    write(tmp_path, KILLED)
    note(tmp_path, 1000.0, 1031.0, 137)
    seconds = seconds_by_kind(spans_of(read_attempts(tmp_path)))
    assert (seconds["productive"], seconds["lost"]) == (2 + 2, 2 + 1 + 10)


def test_the_next_attempt_begins_on_a_line_of_its_own(tmp_path: Path) -> None:
    """A kill or a full disk may have cut the last line."""
    write(tmp_path, KILLED, tail=b'{"t": 1021.0, "ph')
    with Timeline(tmp_path, Held(2), ranks=2, began=2000.0) as timeline:
        timeline.run_dir_ready()
    first, second = read_attempts(tmp_path)
    assert (first.lease, second.lease, second.began) == (1, 2, 2000.0)


def test_without_a_timeline_attempts_are_accounted_for(tmp_path: Path) -> None:
    note(tmp_path, 990.0, 998.0, 1)
    assert [(span.kind, span.seconds) for span in spans_of(read_attempts(tmp_path))] == [("restarting", 8.0)]


@pytest.mark.parametrize("folder", [".", "nowhere"])
def test_a_folder_without_a_timeline_is_refused(tmp_path: Path, folder: str) -> None:
    with refused(MissingInputError, "RUN_DIR", tmp_path / folder):
        show_goodput(tmp_path / folder)


def test_what_cannot_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / TIMELINE_FILE).mkdir()
    with pytest.raises(DataError, match=r"timeline\.jsonl: .*Is a directory"):
        show_goodput(tmp_path)
    os.mkfifo(tmp_path / f"pipe-{TIMELINE_FILE}")
    (tmp_path / TIMELINE_FILE).rmdir()
    (tmp_path / f"pipe-{TIMELINE_FILE}").rename(tmp_path / TIMELINE_FILE)
    with pytest.raises(DataError, match="not a regular file"):
        show_goodput(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="Not a directory"):
        show_goodput(tmp_path / "file")

    def locked(path: Path, *_: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(os, "open", locked)
    with pytest.raises(DataError, match="Permission denied"):
        show_goodput(tmp_path)


def test_an_attempt_is_over_when_its_lease_can_be_taken() -> None:
    assert spans_module.STALE_S == run_lock.STALE_S
