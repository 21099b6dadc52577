"""Bad input ends with one clear message and its exit code: no traceback, nothing half-written."""

import json
from pathlib import Path

import pytest

from tests.conftest import Small
from tests.forked import run_worker
from tests.train.bad_input import CONFIGURATION, EVERY
from tests.train.product import checkpoints, finish, metrics, start, train

WORKER = Path(__file__).with_name("bad_input.py")
TITLES = ("configuration error: ", "data error: ", "checkpoint error: ", "missing input: ", "output error: ")


@pytest.fixture(scope="module")
def refused(small: Small, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What bad_input.py leaves."""
    folder = tmp_path_factory.mktemp("refused")
    overrides = [*small.overrides(folder)[1:], "parallel.tp=1"]
    (folder / "overrides.json").write_text(json.dumps(overrides))
    run_worker(WORKER, folder, folder / "overrides.json")
    return folder


def check_message(lines: list[str], says: list[str]) -> None:
    output = "\n".join(lines)
    assert sum(line.startswith(TITLES) for line in lines) == 1, output
    assert "Traceback" not in output
    assert [part for part in says if part not in output] == [], output


@pytest.mark.parametrize("name", EVERY)
def test_bad_input_is_one_message(refused: Path, name: str) -> None:
    bad = EVERY[name]
    check_message((refused / f"{name}.txt").read_text().splitlines(), bad.says)
    assert json.loads((refused / "exit_codes.json").read_text())[name] == [bad.exit_code] * bad.ranks


@pytest.mark.parametrize("name", [*CONFIGURATION, "no-dataset", "too-short", "more-than-planned"])
def test_what_can_be_known_before_the_first_step_leaves_nothing(refused: Path, name: str) -> None:
    assert (refused / f"{name}.txt").exists()
    assert not (refused / name).exists()


def test_what_shows_later_leaves_no_half_checkpoint(refused: Path) -> None:
    assert metrics(refused / "ids-too-large")
    assert checkpoints(refused / "ids-too-large") == []


@pytest.mark.parametrize("name", ["another-model", "another-order", "missing-rank-file"])
def test_a_refused_resume_leaves_the_run_as_it_was(refused: Path, name: str) -> None:
    finished, run_dir = refused / "finished", refused / name
    kept = [path.relative_to(run_dir) for path in run_dir.rglob("*") if path.is_file()]
    kept = [path for path in kept if path.parts[0] != "lease"]  # which tells who was there
    assert Path("checkpoints/step-00000004/manifest.json") in kept
    assert Path("config.yaml") in kept
    for path in kept:
        assert (run_dir / path).read_bytes() == (finished / path).read_bytes()


def test_through_a_launcher_it_is_the_same_one_message(refused: Path, small: Small, tmp_path: Path) -> None:
    """One case in which all ranks find the problem before they meet, and one in which one rank does later."""
    names = ["sequence", "ids-too-large"]
    jobs = []
    for name in names:
        settings = [setting.format(refused) for setting in EVERY[name].settings]
        overrides = [*small.overrides(tmp_path / name), "parallel.tp=1", *settings]
        jobs.append(start(overrides, ranks=2))
    for name, job in zip(names, jobs, strict=True):
        found = finish(job)
        assert found.exit_code == EVERY[name].exit_code
        check_message(found.lines, EVERY[name].says)


def test_debug_prints_a_traceback(small: Small, tmp_path: Path) -> None:
    found = train([*small.overrides(tmp_path), "parallel.tp=1", "model.hidden_size=66", "--debug"])
    assert found.exit_code == 64
    assert found.lines[0].startswith("Traceback")
    assert "model.hidden_size = 66" in found.lines[-1]
