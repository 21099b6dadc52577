"""llama_mcore.watchdog.stall_report: who is behind, and what is written down."""

import json
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from llama_mcore.distributed.launch_env import RankInfo
from llama_mcore.small_file import read_json
from llama_mcore.watchdog import stall_report
from llama_mcore.watchdog.stall_report import Report, StallReport, behind, summary

WELL = Report(0, "node1", 100, "train", 12, 50, 9.0, 0.2, "sleeping", "", 1e12)


def report(rank: int, **changes: object) -> Report:
    return replace(WELL, rank=rank, host=f"node{rank + 1}", **changes)  # type: ignore[arg-type]


STOPPED = report(2, since_alive_s=9.0, state="stopped", beats=51)
LOCKED = report(1, since_alive_s=9.0, state="running")


@pytest.mark.parametrize(
    ("reports", "ranks"),
    [
        ([report(0), report(1, beats=49), report(2)], [1]),
        ([report(0, beats=49), STOPPED], [2]),  # a silent rank explains one that waits
        ([report(0), LOCKED, STOPPED], [1, 2]),
        ([report(0), report(1)], []),
        ([report(0)], []),
    ],
)
def test_ranks_behind(reports: list[Report], ranks: list[int]) -> None:
    assert [late.rank for late in behind(reports)] == ranks


def test_the_summary_names_ranks_hosts_and_reasons() -> None:
    text = summary([report(0), LOCKED, STOPPED], 5, Path("stalls/12"))
    assert "train of step 12: no sign of life for 9 s" in text
    assert "behind: rank 1 on node2 (running, and no Python thread ran for 9 s), " in text
    assert "rank 2 on node3 (stopped for 9 s)" in text
    assert "no report from: rank 3, rank 4" in text
    assert "stalls/12" in text


def test_a_long_list_is_cut() -> None:
    text = summary([report(0)], 2048, Path("stalls/12"))
    assert "rank 8, and 2039 more" in text


class Clock:
    """Stand-in for `time` in stall_report.py: nobody waits, and what waits would have seen happens in
    between."""

    def __init__(self, ahead_s: float = 0.0) -> None:
        self.now = 0.0
        self.pauses: list[float] = []
        self.meanwhile: Callable[[], object] = lambda: None
        self._ahead_s = ahead_s

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return time.time() + self._ahead_s

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.pauses.append(seconds)
        self.meanwhile()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    monkeypatch.setattr(stall_report, "time", Clock())
    return stall_report.time  # type: ignore[return-value]


def begun(run_dir: Path, rank: int, world_size: int, clock: Clock) -> StallReport:
    """Report of a supervisor that has watched for a minute."""
    made = StallReport(run_dir, RankInfo(rank, world_size, host=f"node{rank + 1}"))
    clock.now += 60
    return made


def put(folder: Path, *reports: Report) -> None:
    """Write reports as other ranks do."""
    folder.mkdir(parents=True, exist_ok=True)
    for other in reports:
        (folder / f"rank-{other.rank:05d}.json").write_text(json.dumps(other.__dict__))


def make_old(folder: Path) -> None:
    os.utime(folder, (1, 1))


def test_rank_0_reads_the_reports_of_this_attempt(tmp_path: Path, clock: Clock) -> None:
    """Reports: of a rank that has begun the next step, of an earlier attempt, and a half-written one."""
    mine = begun(tmp_path, 0, 4, clock)
    put(tmp_path / "stalls/00000011", report(2, beats=1))
    make_old(tmp_path / "stalls/00000011")
    put(tmp_path / "stalls/00000013", report(1, beats=49))
    folder = tmp_path / "stalls/00000012"
    folder.mkdir()
    (folder / "rank-00003.json").write_text('{"rank": 3')
    text = mine.write(WELL, "stacks of rank 0")
    assert "behind: rank 1 on node2\n" in text
    assert "no report from: rank 2, rank 3\n" in text
    assert (folder / "summary.txt").read_text() == text + "\n"
    assert (folder / "rank-00000.txt").read_text() == "stacks of rank 0"
    assert json.loads((folder / "rank-00000.json").read_text()) == WELL.__dict__
    assert [path.name for path in (tmp_path / "stalls").glob("*.tmp")] == []


def test_attempts_that_stall_at_one_step_keep_what_they_wrote(tmp_path: Path, clock: Clock) -> None:
    for name in ("00000012", "00000012-2", "00000012-3"):
        for rank in (1, 0):
            stacks = f"of {name}"
            begun(tmp_path, rank, 2, clock).write(report(rank), stacks)
        make_old(tmp_path / "stalls" / name)
    folders = sorted((tmp_path / "stalls").iterdir())
    assert [folder.name for folder in folders] == ["00000012", "00000012-2", "00000012-3"]
    for folder in folders:
        assert [(folder / f"rank-0000{rank}.txt").read_text() for rank in (0, 1)] == [f"of {folder.name}"] * 2
        assert f"stacks: {folder}\n" in (folder / "summary.txt").read_text()
        assert "no report" not in (folder / "summary.txt").read_text()


@pytest.mark.parametrize("ahead_s", [-3600, 3600])
def test_the_clock_of_a_node_does_not_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ahead_s: float
) -> None:
    """Ranks whose clocks differ find each other, and no attempt's folder of an hour before."""
    put(tmp_path / "stalls/00000012", report(1, beats=1))
    before = time.time() - 1800
    os.utime(tmp_path / "stalls/00000012", (before, before))
    for rank, ahead in ((1, 0.0), (0, ahead_s)):
        clock = Clock(ahead)
        monkeypatch.setattr(stall_report, "time", clock)
        text = begun(tmp_path, rank, 2, clock).write(report(rank), "")
    assert "no report" not in text
    assert {path.name for path in (tmp_path / "stalls/00000012-2").glob("*.json")} == {
        "rank-00000.json",
        "rank-00001.json",
    }


def test_rank_0_reads_a_report_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    folder, read = tmp_path / "stalls/00000012", []
    monkeypatch.setattr(
        stall_report, "read_json", lambda path, limit: read.append(path.name) or read_json(path, limit)
    )
    late = iter([report(2), report(3)])
    clock.meanwhile = lambda: put(folder, next(late, WELL))
    text = begun(tmp_path, 0, 5, clock).write(WELL, "")
    assert "no report from: rank 1, rank 4\n" in text
    assert read == ["rank-00002.json", "rank-00003.json"]
    assert sum(clock.pauses) == pytest.approx(stall_report.COLLECT_S)
    assert len(clock.pauses) < 10


def test_other_ranks_look_seldom(tmp_path: Path, clock: Clock) -> None:
    """There may be thousands."""
    begun(tmp_path, 1, 2, clock).write(report(1), "")
    assert clock.pauses == [1, 2, 4, 4, 4]


def test_other_ranks_leave_when_the_summary_is_there(tmp_path: Path, clock: Clock) -> None:
    """The summary is of a rank 0 that had not begun the step."""
    folder = tmp_path / "stalls/00000011"
    clock.meanwhile = lambda: put(folder) or (folder / "summary.txt").touch()
    begun(tmp_path, 1, 2, clock).write(report(1), "")
    assert clock.pauses == [1]


def test_other_ranks_leave_the_summary_to_rank_0(tmp_path: Path, clock: Clock) -> None:
    assert begun(tmp_path, 1, 2, clock).write(report(1), "") == ""
    folder = tmp_path / "stalls/00000012"
    assert "does not answer: it is sleeping" in (folder / "rank-00001.txt").read_text()
    assert not (folder / "summary.txt").exists()


def test_an_unwritable_folder_still_gives_a_summary(tmp_path: Path) -> None:
    (tmp_path / "stalls").touch()
    text = StallReport(tmp_path, RankInfo(0, 1, host="node1")).write(WELL, "")
    assert "train of step 12" in text
