"""Where a run begins: --resume, --fresh, and the folder that is in use. Never silently anew."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pytest

from llama_mcore.checkpoint.compare import changed_settings
from tests.support.errors import ANY, is_shown
from tests.support.models import Small
from tests.support.product import Finished, checkpoints, metrics, train

pytestmark = pytest.mark.process

SETTINGS = ["parallel.tp=1", "checkpoint.interval=2", "checkpoint.keep=9"]
STEPS = 6


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


@dataclass(frozen=True)
class Case:
    name: str
    prepare: Callable[[Path, Path], None]
    """Makes the run's folder, given it and a finished run of four steps."""
    flags: list[str] = field(default_factory=list)
    begins_at: int = 0
    """The step whose checkpoint it goes on from."""
    refused: tuple[int, str] | None = None
    """Exit code, and field of the problem."""


NEVER = ["--resume", "never"]
CASES = [
    Case("auto-goes-on", copied, begins_at=4),
    Case("auto-begins", nothing),
    Case("leftovers", leftovers),
    Case("died-before-its-first-save", without_checkpoints),
    Case("another-runs-folder", without_checkpoints_of_another_run, refused=(64, "run.dir")),
    Case("somebody-elses-folder", somebody_elses, refused=(64, "run.dir")),
    Case("never-into-a-run", copied, NEVER, refused=(64, "run.dir")),
    Case("never-into-nothing", nothing, NEVER),
    Case("fresh", copied, ["--fresh"]),
    Case("named-run", nothing, ["--resume", "{finished}"], begins_at=4),
    Case("named-step", nothing, ["--resume", "{finished}/checkpoints/step-00000002"], begins_at=2),
    Case("named-nowhere", nothing, ["--resume", "{finished}/nowhere"], refused=(66, "--resume")),
    Case("named-empty", nothing, ["--resume", "{finished}/tensorboard"], refused=(66, "checkpoint")),
]


@dataclass(frozen=True)
class Started:
    run_dir: Path
    finished: Path
    ended: Finished

    def trained(self) -> list[int]:
        """Steps that this start has added to those of the finished run."""
        before = metrics(self.finished)
        return [row["step"] for row in metrics(self.run_dir) if row not in before]

    def losses(self) -> dict[int, float]:
        return {row["step"]: row["loss"] for row in metrics(self.run_dir)}


@pytest.fixture(scope="module")
def started(
    small: Small, uninterrupted: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Started]:
    """started(name): what became of the case of this name, which is tried once."""
    folder = tmp_path_factory.mktemp("resume")
    finished = uninterrupted([*SETTINGS, "train.steps=4"], ranks=1)
    cases = {case.name: case for case in CASES}

    @cache
    def ended(name: str) -> Started:
        case, run_dir = cases[name], folder / name
        case.prepare(run_dir, finished)
        flags = [flag.format(finished=finished) for flag in case.flags]
        settings = [*small.overrides(run_dir), *SETTINGS, f"train.steps={STEPS}"]
        return Started(run_dir, finished, train(settings, *flags))

    return ended


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_each_start_ends_as_it_should(started: Callable[[str], Started], case: Case) -> None:
    found = started(case.name)
    output = found.ended.output
    if case.refused:
        exit_code, problem = case.refused
        assert found.ended.exit_code == exit_code, output
        assert is_shown(output, problem, ANY), output
    else:
        assert found.ended.exit_code == 0, output
        assert found.trained() == list(range(case.begins_at + 1, STEPS + 1))
        assert metrics(found.run_dir)[-1]["step"] == STEPS
        assert checkpoints(found.run_dir)[-1] == "step-00000006"


def test_a_resume_says_which_settings_changed(started: Callable[[str], Started]) -> None:
    output = started("auto-goes-on").ended.output
    assert "train.steps: 4 -> 6" in output
    assert "optim." not in output


def test_changed_settings_are_found_in_every_depth() -> None:
    before = {"a": 1, "b": {"c": {"d": 2, "gone": 3}, "e": [1]}}
    now = {"a": 1, "b": {"c": {"d": 4}, "e": [1], "new": 5}}
    assert changed_settings(before, now) == [
        "b.c.d: 2 -> 4",
        "b.c.gone: 3 -> not set",
        "b.new: not set -> 5",
    ]


def test_what_was_refused_is_untouched(started: Callable[[str], Started]) -> None:
    left = started("somebody-elses-folder").run_dir.glob("[!l]*")
    assert [path.name for path in left] == ["thesis.txt"]
    assert not started("named-nowhere").run_dir.exists()
    assert not (started("never-into-a-run").run_dir / "checkpoints/step-00000006").exists()


def test_where_a_run_would_be_overwritten_the_way_out_is_named(started: Callable[[str], Started]) -> None:
    assert "--fresh" in started("another-runs-folder").ended.output


def test_what_fresh_replaces_is_kept_aside(started: Callable[[str], Started]) -> None:
    run_dir = started("fresh").run_dir
    (aside,) = run_dir.parent.glob("fresh.before-*")
    assert checkpoints(aside) == ["step-00000002", "step-00000004"]
    assert checkpoints(run_dir)[0] == "step-00000002"
    assert [row["step"] for row in metrics(run_dir)] == list(range(1, STEPS + 1))


def test_a_named_checkpoint_gives_the_same_steps(started: Callable[[str], Started]) -> None:
    from_two, went_on = started("named-step").losses(), started("auto-goes-on").losses()
    assert list(from_two) == [3, 4, 5, 6]
    continues = [row.get("continues") for row in metrics(started("named-step").run_dir)]
    assert continues == [str(started("named-step").finished / "checkpoints/step-00000002"), None, None, None]
    assert not any("continues" in row for row in metrics(started("auto-goes-on").run_dir))
    # the schedule of four steps decided steps 3 and 4 of the finished run
    assert from_two[3] == went_on[3]
