"""llama_mcore.diagnose.preflight on two real ranks: each fault that one of them sees is known to both."""

import json
import os
from dataclasses import asdict
from pathlib import Path

import pytest

from llama_mcore.config.load import load_config
from llama_mcore.config.schema import RunConfig
from llama_mcore.diagnose import checks_node
from llama_mcore.diagnose.checks_node import source_digest
from llama_mcore.diagnose.finding import Finding
from llama_mcore.plan.layout.footprint import memory_of
from tests.diagnose.preflights import SPEEDS, Seen, look_at_all
from tests.support.models import Small
from tests.support.world import call

# Case -> group and name of the only problem, and what its meaning and its value name.
FAULTS = {
    "foreign": ("run folder", "run.dir", "", "on every rank"),
    "in-use": ("run folder", "run.dir", "process 1 on elsewhere", "on every rank"),
    "another-model": ("run folder", "model.num_layers", "from 2 in", "3 (on every rank)"),
    "no-sound-checkpoint": ("run folder", ("file", "--resume"), "", "on every rank"),
    "no-progress": ("run folder", "run.dir", "137", "on every rank"),
    "data-hangs": ("data", "datasets", "hangs", "1 of 2 ranks: n2"),
    "folder-hangs": ("run folder", "run.dir", "hangs", "1 of 2 ranks: n2"),
    "start-hangs": ("run folder", "start", "hangs", "1 of 2 ranks: n1"),
    "other-folder": ("run folder", "run.dir", "rank 0", "1 of 2 ranks: n2"),
    "no-data": ("data", "data.train", "", "1 of 2 ranks: n2"),
    "too-little-data": ("data", "source train", "", "on every rank"),
    "unwritable": ("run folder", "run.dir", "Not a directory", "on every rank"),
    "version": ("nodes", "numpy", "1 of 2 ranks: n2", "1.0"),
    "checkout": ("nodes", "llama_mcore", "1 of 2 ranks: n2", ""),
    "other-data": ("nodes", "source train: train", "rank 0", "1 of 2 ranks: n2"),
    "other-settings": ("nodes", "optim.lr", "rank 0", "0.5 (on 1 of 2 ranks: n2)"),
    "another-ds-file": ("nodes", "zero.config: ", "rank 0", "1 of 2 ranks: n2"),
    "clock": ("nodes", "clocks", "n1 is behind n2", ""),
    "full": ("run folder", "free space", "", "1 of 2 ranks: n2"),
    "memory": ("memory", "model state", "", "1 of 2 ranks: n2"),
}
Looks = dict[str, list[Seen]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("preflight")


@pytest.fixture(scope="module")
def looks(folder: Path, small: Small) -> Looks:
    return call(look_at_all, folder, small.overrides(folder / "runs" / "run"))


def of_group(seen: Seen, group: str) -> dict[str, Finding]:
    return {finding.name: finding for finding in seen.findings if finding.group == group}


@pytest.mark.process
def test_a_sound_job_can_start(looks: Looks) -> None:
    seen = looks["sound"][0]
    assert seen.exit_code == 0
    assert {finding.status for finding in seen.findings} == {"ok"}
    groups = {finding.group for finding in seen.findings}
    assert groups == {"data", "run folder", "memory", "kernels", "collectives", "nodes"}


@pytest.mark.process
@pytest.mark.parametrize("case", FAULTS)
def test_a_fault_of_one_rank_stops_all_and_is_named(looks: Looks, case: str) -> None:
    group, name, meaning, value = FAULTS[case]
    seen, of_rank_1 = looks[case]
    assert seen == of_rank_1
    assert seen.exit_code == 69
    problems = [finding for finding in seen.findings if finding.status != "ok"]
    assert len(problems) == len(seen.problems) > 0
    for problem in problems:
        assert problem.group == group
        assert problem.name.startswith(name)
        assert meaning in problem.meaning
        assert value in problem.value
    assert problems[-1].remedy


@pytest.mark.process
def test_what_a_start_would_do_is_said(looks: Looks, folder: Path) -> None:
    def ahead(case: str) -> Finding:
        seen = looks[case][0]
        assert seen.exit_code == 0
        return of_group(seen, "run folder")["start"]

    checkpoints = folder / "prepared" / "continues" / "checkpoints"
    assert ahead("sound").value == "starts from scratch"
    assert ahead("continues").value == f"continues at step 4 from {checkpoints / 'step-00000004'}"
    damaged = ahead("newest-damaged")
    assert damaged.status == "note"
    assert "step 2" in damaged.value
    assert "step-00000004" in damaged.meaning
    assert ahead("retried").value == "starts from scratch"
    assert "aside" in ahead("fresh").value


@pytest.mark.process
def test_room_for_what_is_certain_and_not_for_the_estimate_is_a_note(looks: Looks) -> None:
    seen = looks["tight"][0]
    assert seen.exit_code == 0
    (note,) = [finding for finding in seen.findings if finding.status != "ok"]
    assert (note.group, note.name, note.status) == ("memory", "model state and activations", "note")
    assert "1 of 2 ranks: n2" in note.value


@pytest.mark.process
def test_a_wrong_sum_stops_all(looks: Looks) -> None:
    for seen in looks["wrong-sum"]:
        assert seen.exit_code == 69
        (problem,) = seen.problems
        assert problem.field == "collectives"
        assert "wrong sum" in str(problem.value)


@pytest.mark.process
def test_rank_0_alone_prints(looks: Looks) -> None:
    assert "a training run can start" in looks["sound"][0].output
    assert looks["sound"][1].output == ""
    assert "cannot start: 1 problem" in looks["full"][0].output


@pytest.mark.process
def test_json_has_the_findings(looks: Looks) -> None:
    seen = looks["json"][0]
    printed = json.loads(seen.output[seen.output.index("{") :])
    assert printed["ok"]
    assert printed["findings"] == [asdict(finding) for finding in seen.findings]


@pytest.mark.process
def test_it_leaves_nothing_behind(looks: Looks, folder: Path) -> None:
    assert not (folder / "runs").exists()
    assert not (folder / "elsewhere").exists()


@pytest.mark.process
def test_a_group_far_slower_than_its_kind_is_a_note_with_its_host(looks: Looks) -> None:
    """Groups of tp: a dp group is about half as fast, and the only group of all ranks differs by chance."""
    seen = looks["slow-group"][0]
    found = of_group(seen, "collectives")
    slow = found["2 ranks of tp"]
    assert slow.status == "note"
    assert slow.value == "13.00 GB/s, the slowest on n3"
    assert "26.50 GB/s" in slow.meaning  # the median
    assert (found["2 ranks of dp"].status, found["4 ranks"].status) == ("ok", "ok")
    assert found["2 ranks of dp"].value.startswith(f"{min(SPEEDS['dp'])}.00 GB/s")
    assert seen.exit_code == 0


@pytest.mark.process
def test_data_parallel_groups_are_measured_too(looks: Looks) -> None:
    names = {case: [*of_group(looks[case][0], "collectives")] for case in ("sound", "dp")}
    assert names == {"sound": ["2 ranks", "2 ranks of tp"], "dp": ["2 ranks", "2 ranks of dp"]}


def gpu(monkeypatch: pytest.MonkeyPatch, run: RunConfig, free: int, total: int) -> dict[str, Finding]:
    monkeypatch.setattr(checks_node, "gpu_memory_bytes", lambda: (free, total))
    monkeypatch.setattr(checks_node, "available_memory", lambda: total)
    return {finding.name: finding for finding in checks_node.memory(run, 8, 8)}


def test_what_other_processes_hold_of_a_gpu_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    run = load_config("7b")
    plan, name = memory_of(run, 8), "model state and activations"
    own, total = plan.libraries, 100 * plan.total
    alone = gpu(monkeypatch, run, total - own, total)
    assert [alone[name].status, *alone] == ["ok", name, "checkpoints"]
    shared = gpu(monkeypatch, run, total // 2, total)
    assert (shared[name].status, shared["in use"].status) == ("ok", "note")
    certain = plan.state.total + plan.saved_layers + plan.saved_rest
    assert gpu(monkeypatch, run, plan.total - own, total)[name].status == "ok"
    assert gpu(monkeypatch, run, plan.total - own - 1, total)[name].status == "note"
    assert gpu(monkeypatch, run, certain - own - 1, total)[name].status == "problem"


@pytest.mark.parametrize(
    ("gpu", "zero", "training"),
    [(True, "zero1", False), (True, "zero3_offload", True), (False, "zero1", True)],
)
def test_host_memory_of_saves_is_what_training_leaves(
    monkeypatch: pytest.MonkeyPatch, gpu: bool, zero: str, training: bool
) -> None:
    """Half of it is for copies; with less they go through a ring."""
    stage = 3 if "zero3" in zero else 1
    run = load_config("7b", [f"zero.stage={stage}", f"zero.config=ds_configs/{zero}.json"])
    plan = memory_of(run, 8)
    own = 0 if not training else plan.host_state if gpu else plan.total - plan.libraries
    assert bool(own) == training
    monkeypatch.setattr(checks_node, "gpu_memory_bytes", lambda: (100 * plan.total,) * 2 if gpu else None)

    def found(available: int) -> Finding:
        monkeypatch.setattr(checks_node, "available_memory", lambda: available)
        return {finding.name: finding for finding in checks_node.memory(run, 8, 8)}["checkpoints"]

    enough = 8 * (own + 2 * plan.state.saved)
    assert found(enough).status == "ok"
    assert found(enough - 1).status == "note"
    assert "256.0 MiB" in found(0).meaning


def test_any_change_of_the_sources_is_another_version(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1\n")
    before = source_digest(tmp_path)
    assert source_digest(tmp_path) == before
    (tmp_path / "a.py").write_text("x = 2\n")
    changed = source_digest(tmp_path)
    (tmp_path / "b.py").touch()
    os.mkfifo(tmp_path / "pipe.py")
    with_pipe = source_digest(tmp_path)
    (tmp_path / "pipe.py").unlink()
    assert len({before, changed, with_pipe, source_digest(tmp_path)}) == 4
