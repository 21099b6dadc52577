"""Where a run begins: --resume, --fresh, and the folder that is in use. Never silently anew."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from llama_mcore.checkpoint.compare import changed_settings
from tests.conftest import Small
from tests.forked import run_worker
from tests.train.product import checkpoints, metrics

WORKER = Path(__file__).with_name("two_sources.py")


@dataclass(frozen=True)
class Case:
    name: str
    exit_code: int
    flags: list[str]
    prepare: Callable[[Path, Path], None]
    """Makes the run's folder, given it and a finished run of four steps."""
    says: str = ""
    steps: int = 6


def nothing(run_dir: Path, finished: Path) -> None:
    pass


def copied(run_dir: Path, finished: Path) -> None:
    shutil.copytree(finished, run_dir)


def without_checkpoints(run_dir: Path, finished: Path) -> None:
    """Of a run that was killed before its first save; the settings are those of the case."""
    run_dir.mkdir()
    shutil.copy(finished / "metrics.jsonl", run_dir)


def somebody_elses(run_dir: Path, finished: Path) -> None:
    run_dir.mkdir()
    (run_dir / "thesis.txt").write_text("irreplaceable")


def without_checkpoints_of_another_run(run_dir: Path, finished: Path) -> None:
    copied(run_dir, finished)
    shutil.rmtree(run_dir / "checkpoints")
    text = (run_dir / "config.yaml").read_text()
    (run_dir / "config.yaml").write_text(text.replace("seed: 1234", "seed: 1"))


def leftovers(run_dir: Path, finished: Path) -> None:
    """Of a preflight and of a start that were killed; an older version wrote the configuration in place."""
    run_dir.mkdir()
    for name in (
        ".preflight",
        ".preflight-00001.tmp",
        "metrics.jsonl.tmp",
        ".config.yaml.tmp",
        "config.yaml",
    ):
        (run_dir / name).touch()


CASES = [
    Case("auto-goes-on", 0, [], copied, "resuming at step 4"),
    Case("auto-begins", 0, [], nothing),
    Case("leftovers", 0, [], leftovers),
    Case("died-before-its-first-save", 0, [], without_checkpoints),
    Case("another-runs-folder", 64, [], without_checkpoints_of_another_run, "--fresh"),
    Case("somebody-elses-folder", 64, [], somebody_elses, "is not empty"),
    Case("never-into-a-run", 64, ["--resume", "never"], copied, "is not empty"),
    Case("never-into-nothing", 0, ["--resume", "never"], nothing),
    Case("fresh", 0, ["--fresh"], copied),
    Case("named-run", 0, ["--resume", "{finished}"], nothing, "resuming at step 4"),
    Case(
        "named-step", 0, ["--resume", "{finished}/checkpoints/step-00000002"], nothing, "resuming at step 2"
    ),
    Case("named-nowhere", 66, ["--resume", "{finished}/nowhere"], nothing, "no such file or folder"),
    Case("named-empty", 66, ["--resume", "{finished}/tensorboard"], nothing, "holds no complete checkpoint"),
]


@dataclass(frozen=True)
class Done:
    folder: Path
    exit_codes: dict[str, list[int]]


@pytest.fixture(scope="module")
def done(small: Small, tmp_path_factory: pytest.TempPathFactory) -> Done:
    folder = tmp_path_factory.mktemp("resume")

    def command(run_dir: Path, steps: int, *flags: str) -> list[str]:
        settings = [*small.overrides(run_dir), "parallel.tp=1", "checkpoint.interval=2", "checkpoint.keep=9"]
        return ["train", "--config", "tiny", *settings, f"train.steps={steps}", *flags]

    finished = folder / "finished"
    run(folder, [("finished", 1, command(finished, 4))])
    jobs = []
    for case in CASES:
        case.prepare(folder / case.name, finished)
        flags = [flag.format(finished=finished) for flag in case.flags]
        jobs.append((case.name, 1, command(folder / case.name, case.steps, *flags)))
    return Done(folder, run(folder, jobs))


def run(folder: Path, jobs: list[tuple[str, int, list[str]]]) -> dict[str, list[int]]:
    (folder / "jobs.json").write_text(json.dumps(jobs))
    run_worker(WORKER, folder, folder / "jobs.json")
    return json.loads((folder / "exit_codes.json").read_text())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_each_start_ends_as_it_should(done: Done, case: Case) -> None:
    said = (done.folder / f"{case.name}.txt").read_text()
    assert done.exit_codes[case.name] == [case.exit_code], said
    assert case.says in said
    if case.exit_code == 0:
        rows = metrics(done.folder / case.name)
        assert rows[-1]["step"] == 6
        assert checkpoints(done.folder / case.name)[-1] == "step-00000006"


def test_a_resume_says_which_settings_changed(done: Done) -> None:
    said = (done.folder / "auto-goes-on.txt").read_text()
    assert "since the checkpoint: train.steps: 4 -> 6" in said
    assert "since the checkpoint: optim" not in said


def test_changed_settings_are_found_in_every_depth() -> None:
    before = {"a": 1, "b": {"c": {"d": 2, "gone": 3}, "e": [1]}}
    now = {"a": 1, "b": {"c": {"d": 4}, "e": [1], "new": 5}}
    assert changed_settings(before, now) == [
        "b.c.d: 2 -> 4",
        "b.c.gone: 3 -> not set",
        "b.new: not set -> 5",
    ]


def test_what_was_refused_is_untouched(done: Done) -> None:
    assert [path.name for path in (done.folder / "somebody-elses-folder").glob("[!l]*")] == ["thesis.txt"]
    assert not (done.folder / "named-nowhere").exists()
    assert not (done.folder / "never-into-a-run/checkpoints/step-00000006").exists()


def test_what_fresh_replaces_is_kept_aside(done: Done) -> None:
    (aside,) = done.folder.glob("fresh.before-*")
    assert checkpoints(aside) == ["step-00000002", "step-00000004"]
    assert checkpoints(done.folder / "fresh")[0] == "step-00000002"
    assert [row["step"] for row in metrics(done.folder / "fresh")] == list(range(1, 7))


def test_a_named_checkpoint_gives_the_same_steps(done: Done) -> None:
    def losses(name: str) -> dict[int, float]:
        return {row["step"]: row["loss"] for row in metrics(done.folder / name)}

    from_two, went_on = losses("named-step"), losses("auto-goes-on")
    assert list(from_two) == [3, 4, 5, 6]
    # the schedule of four steps decided steps 3 and 4 of the finished run
    assert from_two[3] == went_on[3]
