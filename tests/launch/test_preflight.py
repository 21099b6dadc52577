"""llama_mcore.launch.preflight on two real ranks: each fault that one of them sees is known to both."""

import json
from pathlib import Path
from typing import Any

import pytest

from llama_mcore.config import RunConfig, load_run
from llama_mcore.launch import node_checks, preflight
from llama_mcore.launch.finding import Finding
from llama_mcore.launch.preflight import Report, Speed
from llama_mcore.launch.versions import source_digest
from llama_mcore.plan.footprint import memory_of
from tests.conftest import Small
from tests.forked import run_worker

WORKER = Path(__file__).with_name("preflights.py")
# Case -> group and name of the only problem, and what it says.
FAULTS = {
    "foreign": ("run folder", "run.dir", "the run would begin anew there", "on every rank"),
    "in-use": ("run folder", "run.dir", "is in use by process 1 on elsewhere", "on every rank"),
    "another-model": (
        "run folder",
        "model.num_layers",
        "differs from 2 in the checkpoint",
        "3 (on every rank)",
    ),
    "no-sound-checkpoint": ("run folder", ("file", "run.dir"), "", "on every rank"),
    "no-progress": ("run folder", "run.dir", "saved no checkpoint and ended with", "on every rank"),
    "data-hangs": ("data", "datasets", "hangs", "no answer in 1 s (on 1 of 2 ranks: n2)"),
    "folder-hangs": ("run folder", "run.dir", "hangs", "no answer in 1 s (on 1 of 2 ranks: n2)"),
    "start-hangs": ("run folder", "start", "hangs", "no answer in 1 s (on 1 of 2 ranks: n1)"),
    "other-folder": ("run folder", "run.dir", "is not the folder that rank 0 sees", "1 of 2 ranks: n2"),
    "no-data": ("data", "dataset", "no such file", "1 of 2 ranks: n2"),
    "too-little-data": ("data", "source train", "would read more than", "on every rank"),
    "unwritable": ("run folder", "run.dir", "cannot be used (Not a directory)", "on every rank"),
    "version": ("nodes", "numpy", "on the other nodes", "1.0"),
    "checkout": ("nodes", "llama_mcore", "on the other nodes", ""),
    "other-data": ("nodes", "source train: train", "on rank 0", "1 of 2 ranks: n2"),
    "other-settings": ("nodes", "optim.lr", "on rank 0", "0.5 (on 1 of 2 ranks: n2)"),
    "another-ds-file": ("nodes", "zero.config: ", "on rank 0", "1 of 2 ranks: n2"),
    "clock": ("nodes", "clocks", "n1 is behind n2", ""),
    "full": ("run folder", "free space", "2 checkpoints need", "1 of 2 ranks: n2"),
    "memory": ("memory", "model state", "must be less than", "1 of 2 ranks: n2"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, small: Small) -> Path:
    folder = tmp_path_factory.mktemp("preflight")
    run_worker(WORKER, folder, *small.overrides(folder / "runs" / "run"))
    return folder


def found(folder: Path, case: str, rank: int = 0) -> dict[str, Any]:
    return json.loads((folder / f"{case}-{rank}.json").read_text())


def test_a_sound_job_can_start(folder: Path) -> None:
    report = found(folder, "sound")
    assert report["exit_code"] == 0
    assert {finding["status"] for finding in report["findings"]} == {"ok"}
    groups = {finding["group"] for finding in report["findings"]}
    assert groups == {"data", "run folder", "memory", "collectives", "nodes"}


@pytest.mark.parametrize("case", FAULTS)
def test_a_fault_of_one_rank_stops_all_and_is_named(folder: Path, case: str) -> None:
    group, name, meaning, value = FAULTS[case]
    reports = [found(folder, case, rank) for rank in range(2)]
    assert reports[0] == reports[1]
    assert reports[0]["exit_code"] == 69
    problems = [finding for finding in reports[0]["findings"] if finding["status"] != "ok"]
    assert len(problems) == len(reports[0]["problems"]) > 0
    for problem in problems:
        assert problem["group"] == group
        assert problem["name"].startswith(name)
        assert meaning in problem["meaning"]
        assert value in problem["value"]
    assert problems[-1]["remedy"]


def test_what_a_start_would_do_is_said(folder: Path) -> None:
    def ahead(case: str) -> dict[str, Any]:
        report = found(folder, case)
        assert report["exit_code"] == 0
        return next(finding for finding in report["findings"] if finding["name"] == "start")

    checkpoints = folder / "prepared" / "continues" / "checkpoints"
    assert ahead("sound")["value"] == "begins anew"
    assert ahead("continues")["value"] == f"continues at step 4 from {checkpoints / 'step-00000004'}"
    damaged = ahead("newest-damaged")
    assert damaged["status"] == "note"
    assert damaged["value"].startswith("continues at step 2 from ")
    assert "step-00000004" in damaged["meaning"]
    assert ahead("retried")["value"] == "begins anew"
    assert ahead("not-auto")["value"] == "as --resume or --fresh says"


def test_room_for_what_is_certain_and_not_for_the_estimate_is_a_note(folder: Path) -> None:
    report = found(folder, "tight")
    assert report["exit_code"] == 0
    (note,) = [finding for finding in report["findings"] if finding["status"] != "ok"]
    assert (note["group"], note["name"], note["status"]) == ("memory", "model state and activations", "note")
    assert "an estimate, is more than" in note["meaning"]
    assert "1 of 2 ranks: n2" in note["value"]


def test_a_wrong_sum_stops_all(folder: Path) -> None:
    for rank in range(2):
        report = found(folder, "wrong-sum", rank)
        assert report["exit_code"] == 69
        assert "wrong sum" in report["problems"][0]


def test_rank_0_alone_prints(folder: Path) -> None:
    assert "a training run can start" in (folder / "sound-0.txt").read_text()
    assert (folder / "sound-1.txt").read_text() == ""
    assert "cannot start: 1 problem" in (folder / "full-0.txt").read_text()


def test_json_has_the_findings(folder: Path) -> None:
    printed = json.loads((folder / "json-0.txt").read_text().partition("\n{")[2].join(["{", ""]))
    assert printed["ok"]
    names = ("group", "name", "status")
    assert [[one[name] for name in names] for one in printed["findings"]] == [
        [one[name] for name in names] for one in found(folder, "json")["findings"]
    ]


def test_it_leaves_nothing_behind(folder: Path) -> None:
    assert not (folder / "runs").exists()
    assert not (folder / "elsewhere").exists()


def speeds(*gb_per_s: float, ranks: int = 2) -> Finding:
    """What is said of groups of `ranks` ranks, of which rank r measured gb_per_s[r]."""
    reports = [
        Report(f"n{rank}", 0.0, {}, [Speed("ranks of dp", ranks, speed * 1e9)], [])
        for rank, speed in enumerate(gb_per_s)
    ]
    (finding,) = preflight._speeds(reports)
    return finding


def test_a_group_far_slower_than_its_kind_is_a_note_with_its_host() -> None:
    slow = speeds(40.0, 41.0, 19.0, 18.0, 39.0, 40.0)
    assert (slow.name, slow.status) == ("2 ranks of dp", "note")
    assert slow.value == "18.00 GB/s, the slowest on n3"
    assert "the usual 39.50 GB/s" in slow.meaning
    assert not slow.stops_training
    assert speeds(40.0, 41.0, 21.0, 22.0).status == "ok"
    assert speeds(40.0, 40.0, 1.0, ranks=3).status == "ok"


def test_data_parallel_groups_are_measured_too(folder: Path) -> None:
    names = {
        case: [one["name"] for one in found(folder, case)["findings"] if one["group"] == "collectives"]
        for case in ("sound", "dp")
    }
    assert names == {"sound": ["2 ranks", "2 ranks of tp"], "dp": ["2 ranks", "2 ranks of dp"]}


def gpu(monkeypatch: pytest.MonkeyPatch, run: RunConfig, free: int, total: int) -> dict[str, Finding]:
    monkeypatch.setattr(node_checks, "gpu_memory_bytes", lambda: (free, total))
    return {finding.name: finding for finding in node_checks.memory(run, 8, 8)}


def test_what_other_processes_hold_of_a_gpu_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    run = load_run("7b")
    plan, name = memory_of(run, 8), "model state and activations"
    own, total = plan.libraries, 100 * plan.total
    alone = gpu(monkeypatch, run, total - own, total)
    assert [alone[name].status, *alone] == ["ok", name]
    shared = gpu(monkeypatch, run, total // 2, total)
    assert (shared[name].status, shared["in use"].status) == ("ok", "note")
    assert "another process" in shared["in use"].meaning
    certain = plan.state.total + plan.saved_layers + plan.saved_rest
    assert gpu(monkeypatch, run, plan.total - own, total)[name].status == "ok"
    assert gpu(monkeypatch, run, plan.total - own - 1, total)[name].status == "note"
    assert gpu(monkeypatch, run, certain - own - 1, total)[name].status == "problem"


def test_any_change_of_the_sources_is_another_version(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1\n")
    before = source_digest(tmp_path)
    assert source_digest(tmp_path) == before
    (tmp_path / "a.py").write_text("x = 2\n")
    changed = source_digest(tmp_path)
    (tmp_path / "b.py").touch()
    assert len({before, changed, source_digest(tmp_path)}) == 3
