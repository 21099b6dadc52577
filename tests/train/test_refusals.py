"""Bad input ends with one clear message and its exit code: no traceback, nothing half-written."""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from llama_mcore.checkpoint.manifest import read_manifest
from tests.checkpoint.damage import edit_manifest
from tests.support.errors import ANY, is_shown
from tests.support.models import Small, write_tokens
from tests.support.product import Finished, checkpoints, finish, metrics, start, train

pytestmark = pytest.mark.process

TITLES = ("configuration error: ", "data error: ", "checkpoint error: ", "missing input: ", "output error: ")
RANK_FILE = "rank-00000.safetensors"


def nothing(run_dir: Path, finished: Path) -> None:
    pass


def file_in_place(run_dir: Path, finished: Path) -> None:
    run_dir.touch()


def folder_in_place_of_metrics(run_dir: Path, finished: Path) -> None:
    (run_dir / "metrics.jsonl").mkdir(parents=True)


def pipe_in_place_of_metrics(run_dir: Path, finished: Path) -> None:
    """A pipe in a folder that was held before, so that no attempt's number is looked up in the lines."""
    (run_dir / "lease").mkdir(parents=True)
    (run_dir / "lease/00000001.released.json").write_text("{}")
    os.mkfifo(run_dir / "metrics.jsonl")


def file_in_place_of_checkpoints(run_dir: Path, finished: Path) -> None:
    run_dir.mkdir()
    (run_dir / "checkpoints").touch()


def finished_run(run_dir: Path, finished: Path) -> None:
    shutil.copytree(finished, run_dir)


def damaged_checkpoint(run_dir: Path, finished: Path) -> None:
    finished_run(run_dir, finished)
    for path in run_dir.rglob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:1000])


def damaged_run_file(run_dir: Path, finished: Path) -> None:
    finished_run(run_dir, finished)
    (run_dir / "run.json").write_text("{")


def another_runs_checkpoint(run_dir: Path, finished: Path) -> None:
    """An older one: it is not overlooked either."""
    finished_run(run_dir, finished)
    place = run_dir / "checkpoints/step-00000002"
    shutil.copytree(run_dir / "checkpoints/step-00000004", place)
    edit_manifest(place, lambda manifest: manifest.update(run_id="beef", step=2))


def missing_rank_file(run_dir: Path, finished: Path) -> None:
    finished_run(run_dir, finished)
    for path in run_dir.rglob("*.safetensors"):
        path.unlink()


@dataclass(frozen=True)
class Bad:
    exit_code: int
    field: str
    value: object
    names: list[str]
    """What the message has besides: numbers, other settings, files."""
    settings: list[str] = field(default_factory=list)
    """`{}` stands for the folder of bad datasets."""
    prepare: Callable[[Path, Path], None] = nothing
    """Makes what lies in the run's folder before the start; its second argument is a finished run."""
    ranks: int = 1


CONFIGURATION = {
    "world-size": Bad(64, "world size", 2, ["parallel.tp = 4", "4 ranks"], ["parallel.tp=4"], ranks=2),
    "hidden-size": Bad(
        64, "model.hidden_size", 66, ["model.num_attention_heads = 4"], ["model.hidden_size=66"]
    ),
    "ffn": Bad(
        64,
        "model.ffn_hidden_size",
        126,
        ["parallel.tp = 4", "1, 2, 3"],
        ["model.ffn_hidden_size=126", "parallel.tp=4"],
    ),
    "sequence": Bad(
        64, "model.seq_length", 33, ["parallel.tp = 2", "1, 3"], ["model.seq_length=33", "parallel.tp=2"]
    ),
}
DATA = {
    "no-dataset": Bad(
        66, "data.train", ANY, ["nowhere.idx", "preprocess_data.py"], ["data.train={}/nowhere"]
    ),
    "too-short": Bad(65, "dataset", ANY, ["32 tokens", "model.seq_length + 1 = 33"], ["data.train={}/short"]),
    "more-than-planned": Bad(
        65, "source train", "240 windows", ["0.10 epochs", "sample", "available"], ["data.epochs=0.1"]
    ),
    "ids-too-large": Bad(
        65,
        "dataset",
        ANY,
        ["id 300", "model.vocab_size = 256"],
        ["data.train={}/large", "data.epochs=8"],
        ranks=2,
    ),
}
FILES = {
    "run-dir-is-a-file": Bad(73, "run.dir", ANY, [], prepare=file_in_place),
    "metrics-is-a-folder": Bad(
        73, "run.dir", ANY, ["Is a directory"], prepare=folder_in_place_of_metrics, ranks=2
    ),
    "metrics-is-a-pipe": Bad(73, "run.dir", ANY, ["not a regular file"], prepare=pipe_in_place_of_metrics),
    "checkpoints-is-a-file": Bad(73, "run.dir", ANY, [], prepare=file_in_place_of_checkpoints),
    "another-model": Bad(
        64, "model.num_layers", 3, ["from 2", "run.dir"], ["model.num_layers=3"], finished_run
    ),
    "another-order": Bad(65, "run.seed", 7, ["1234", "--accept-data-change"], ["run.seed=7"], finished_run),
    "other-data": Bad(
        65,
        "source train: content",
        ANY,
        ["--accept-data-change"],
        ["data.train={}/one-window"],
        finished_run,
    ),
    "damaged-run-file": Bad(65, "run.json", ANY, ["restore it"], prepare=damaged_run_file, ranks=2),
    "another-runs-checkpoint": Bad(
        64, "checkpoint", ANY, ["step-00000002", "move it out", "run.dir"], prepare=another_runs_checkpoint
    ),
    "damaged-checkpoint": Bad(65, "--resume", "auto", [RANK_FILE, "--fresh"], prepare=damaged_checkpoint),
    "missing-rank-file": Bad(65, "--resume", "auto", [RANK_FILE, "--fresh"], prepare=missing_rank_file),
}
EVERY = CONFIGURATION | DATA | FILES


@dataclass(frozen=True)
class Started:
    run_dir: Path
    finished: Path
    """The run of which `run_dir` may have been a copy."""
    ended: Finished


@pytest.fixture(scope="module")
def bad_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bad-data")
    tokens = np.arange(1000) % 256
    write_tokens(folder / "short", [tokens[:32]])
    write_tokens(folder / "one-window", [tokens[:33]])
    tokens[700] = 300  # in one window: one of two data-parallel ranks meets it
    write_tokens(folder / "large", [tokens])
    return folder


@pytest.fixture(scope="module")
def started(
    small: Small,
    bad_data: Path,
    uninterrupted: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], Started]:
    """started(name): how the case of this name ended, which is tried once."""
    folder = tmp_path_factory.mktemp("refused")
    finished = uninterrupted(["parallel.tp=1", "train.steps=4"], ranks=1)

    @cache
    def ended(name: str) -> Started:
        bad, run_dir = EVERY[name], folder / name
        bad.prepare(run_dir, finished)
        return Started(run_dir, finished, train(settings(bad, small, run_dir, bad_data), ranks=bad.ranks))

    return ended


def settings(bad: Bad, small: Small, run_dir: Path, bad_data: Path) -> list[str]:
    of_case = [setting.format(bad_data) for setting in bad.settings]
    return [*small.overrides(run_dir), "parallel.tp=1", *of_case]


def check_message(output: str, bad: Bad) -> None:
    assert sum(line.startswith(TITLES) for line in output.splitlines()) == 1, output
    assert "Traceback" not in output
    assert is_shown(output, bad.field, bad.value), output
    assert [name for name in bad.names if name not in output] == [], output


@pytest.mark.parametrize("name", EVERY)
def test_bad_input_is_one_message(started: Callable[[str], Started], name: str) -> None:
    bad, ended = EVERY[name], started(name).ended
    check_message(ended.output, bad)
    assert ended.exit_codes == [bad.exit_code] * bad.ranks


@pytest.mark.parametrize("name", ["damaged-checkpoint", "missing-rank-file"])
def test_a_damaged_checkpoint_is_called_one(started: Callable[[str], Started], name: str) -> None:
    """Its exit code is that of bad data."""
    assert any(line.startswith("checkpoint error: ") for line in started(name).ended.lines)


@pytest.mark.parametrize("name", [*CONFIGURATION, "no-dataset", "too-short", "more-than-planned"])
def test_what_can_be_known_before_the_first_step_leaves_nothing(
    started: Callable[[str], Started], name: str
) -> None:
    assert not started(name).run_dir.exists()


def test_what_shows_later_leaves_no_half_checkpoint(started: Callable[[str], Started]) -> None:
    run_dir = started("ids-too-large").run_dir
    assert metrics(run_dir)
    assert checkpoints(run_dir) == []


@pytest.mark.parametrize("name", ["another-model", "another-order", "missing-rank-file"])
def test_a_refused_resume_leaves_the_run_as_it_was(started: Callable[[str], Started], name: str) -> None:
    run_dir, finished = started(name).run_dir, started(name).finished
    kept = [path.relative_to(run_dir) for path in run_dir.rglob("*") if path.is_file()]
    kept = [path for path in kept if path.parts[0] != "lease"]  # which tells who was there
    assert Path("checkpoints/step-00000004/manifest.json") in kept
    assert Path("config.yaml") in kept
    for path in kept:
        assert (run_dir / path).read_bytes() == (finished / path).read_bytes()


def test_another_runs_checkpoint_stays_where_it_is(started: Callable[[str], Started]) -> None:
    run_dir = started("another-runs-checkpoint").run_dir
    assert checkpoints(run_dir) == ["step-00000002", "step-00000004"]
    assert read_manifest(run_dir / "checkpoints/step-00000002").run_id == "beef"


def test_through_a_launcher_it_is_the_same_one_message(small: Small, bad_data: Path, tmp_path: Path) -> None:
    """Two cases: all ranks find the problem before they rendezvous, or one rank does later."""
    cases = {name: EVERY[name] for name in ("sequence", "ids-too-large")}
    jobs = {
        name: start(settings(bad, small, tmp_path / name, bad_data), ranks=2) for name, bad in cases.items()
    }
    for name, bad in cases.items():
        found = finish(jobs[name])
        assert found.exit_code == bad.exit_code
        check_message(found.output, bad)


def test_debug_prints_a_traceback(small: Small, tmp_path: Path) -> None:
    bad = [*small.overrides(tmp_path), "parallel.tp=1", "model.hidden_size=66"]
    found = train(bad, "--debug")
    assert found.exit_code == 64
    assert found.lines[0].startswith("Traceback")
    assert "model.hidden_size = 66" in found.lines[-1]
