"""Saves that are killed, fail, or find a full disk: what loads is the old checkpoint or the new one, whole;
what was acknowledged is never lost; the next save works and cleans up.

`make test` tries a sample of the operations, `make test-crash` all of them.
"""

from collections import Counter

import pytest

from tests.checkpoint.crash_jobs import EVERYTHING, SAMPLE, Case, Tried, try_all
from tests.checkpoint.crash_run import LAST
from tests.support.world import call

pytestmark = pytest.mark.process
KINDS = ["kills", "errors", "full_disk", "strace"]


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Tried:
    return call(try_all, tmp_path_factory.mktemp("crash"), SAMPLE)


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Tried:
    return call(try_all, tmp_path_factory.mktemp("crash"), EVERYTHING, timeout_s=3600)


def cases_of(tried: Tried, kind: str) -> list[Case]:
    found = tried.cases[kind]
    if isinstance(found, str):
        pytest.skip(found)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_fault_loses_nothing(sample: Tried, kind: str) -> None:
    check(cases_of(sample, kind))


@pytest.mark.crash
@pytest.mark.parametrize("kind", KINDS)
def test_no_fault_loses_anything(everything: Tried, kind: str) -> None:
    cases = cases_of(everything, kind)
    check(cases)
    print(f"\n{'fault':20} {'rank':>4} {'tried':>6} {'survived':>8}")
    for (fault, rank), count in sorted(Counter((case.fault, case.rank) for case in cases).items()):
        print(f"{fault:20} {rank:4} {count:6} {count:8}")


def test_ranks_agree_on_what_failed(sample: Tried) -> None:
    failed = [case for case in cases_of(sample, "errors") if case.said]
    assert failed
    for case in failed:
        assert len(case.said) == 2, case
        assert case.said[0] == case.said[1], case
        assert f"rank {case.rank}: " in case.said[0], case


def test_the_disk_fills_up_in_every_part_of_a_save(sample: Tried) -> None:
    """Some saves fail, and some go through; else the disk was never full at the right time."""
    cases = cases_of(sample, "full_disk")
    assert {bool(case.said) for case in cases} == {True, False}
    assert all("No space left on device" in message for case in cases for message in case.said)


def test_the_newest_sound_checkpoints_stay_where_newer_ones_are_damaged(sample: Tried) -> None:
    found, names = sample.retention
    assert found == 3
    kept = [f"step-{step:08d}" for step in (2, 3, 7, 8)]
    assert names == ["latest", *kept]


def test_what_the_run_has_not_written_is_neither_removed_nor_replaced(sample: Tried) -> None:
    names, said = sample.among_others
    others = [f"step-{step:08d}" for step in (1, 5)]
    assert names[0] == ["latest", others[0], "step-00000003", others[1], "step-00000006"]
    assert names[1] == ["latest", others[0], "step-00000003", others[1], f"{others[1]}.tmp", "step-00000006"]
    assert f"{others[1]} belongs to another run (other)" in said
    assert names[2] == ["abandoned-step-00000006", "latest", *others, "step-00000006"]


def check(cases: list[Case]) -> None:
    assert cases
    wrong = [problem for case in cases for problem in problems_of(case)]
    assert not wrong, "\n".join(wrong)


def problems_of(case: Case) -> list[str]:
    expected = {
        "did not fire": case.fired,
        # the version being saved may be there before the ranks have said so
        f"{case.acknowledged} was acknowledged, {case.found} found": case.found - case.acknowledged in (0, 1),
        f"{case.after} found after the next save": case.after == LAST[1],
        f"left over: {case.names}": case.names == ["latest", f"step-{LAST[0]:08d}"],
        # a short write and an interrupted call are no failures
        f"said {case.said}": not (case.said and case.fault in ("short write", "error=EINTR")),
    }
    return [
        f"{case.fault} of rank {case.rank} at {case.where}: {what}"
        for what, holds in expected.items()
        if not holds
    ]
