"""llama_mcore.launch.stall: who is behind, and what is written down."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from llama_mcore.launch import stall
from llama_mcore.launch.rank_on_host import RankOnHost
from llama_mcore.launch.stall import Report, StallReport, behind, summary

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


def test_rank_0_reads_the_reports_of_this_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One rank has begun the next step, one report is of a life before, one is half written."""
    monkeypatch.setattr(stall, "COLLECT_S", 0.3)
    for step, other in ((13, report(1, beats=49)), (12, report(2, written=1.0, beats=1))):
        folder = tmp_path / "stalls" / f"{step:08d}"
        folder.mkdir(parents=True)
        (folder / f"rank-{other.rank:05d}.json").write_text(json.dumps(other.__dict__))
    (tmp_path / "stalls/00000012/rank-00003.json").write_text('{"rank": 3')
    text = StallReport(tmp_path, RankOnHost(0, 4, "node1")).write(WELL, "stacks of rank 0")
    assert "behind: rank 1 on node2\n" in text
    assert "no report from: rank 2, rank 3\n" in text
    folder = tmp_path / "stalls/00000012"
    assert (folder / "summary.txt").read_text() == text + "\n"
    assert (folder / "rank-00000.txt").read_text() == "stacks of rank 0"
    assert json.loads((folder / "rank-00000.json").read_text()) == WELL.__dict__


def test_other_ranks_leave_the_summary_to_rank_0(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stall, "COLLECT_S", 0.3)
    assert StallReport(tmp_path, RankOnHost(1, 2, "node2")).write(report(1), "") == ""
    folder = tmp_path / "stalls/00000012"
    assert "does not answer: it is sleeping" in (folder / "rank-00001.txt").read_text()
    assert not (folder / "summary.txt").exists()


def test_an_unwritable_folder_still_gives_a_summary(tmp_path: Path) -> None:
    (tmp_path / "stalls").touch()
    text = StallReport(tmp_path, RankOnHost(0, 1, "node1")).write(WELL, "")
    assert "train of step 12" in text
