"""Start of a run: --resume, --fresh, and a folder that is in use; never from scratch in silence."""

import json
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path

import pytest

from llama_mcore.checkpoint.audit import audit_run
from llama_mcore.checkpoint.diff import changed_settings
from llama_mcore.checkpoint.manifest import read_manifest
from llama_mcore.checkpoint.paths import step_dir
from llama_mcore.checkpoint.start import Start
from llama_mcore.observe.goodput.attempts import AttemptStarted, add_attempt
from llama_mcore.train.resume import after_requeue
from tests.support.errors import ANY, is_shown
from tests.support.models import Small
from tests.support.product import Finished, checkpoints, llama_mcore, metrics, numbers, train
from tests.train.attempts import Attempt, ask, be_killed, first_steps, live

pytestmark = pytest.mark.process

SETTINGS = ["parallel.tp=1", "checkpoint.interval=2", "checkpoint.keep=9"]
STEPS = 6


def nothing(run_dir: Path, finished: Path) -> None:
    pass


def copied(run_dir: Path, finished: Path) -> None:
    shutil.copytree(finished, run_dir)


def without_run_file(run_dir: Path, finished: Path) -> None:
    """A backup of the checkpoints, and a copy under a name of its own."""
    shutil.copytree(finished / "checkpoints", run_dir / "checkpoints")
    shutil.copytree(finished / "checkpoints/step-00000002", run_dir / "checkpoints/step-best")


def with_a_foreign_checkpoint(run_dir: Path, finished: Path) -> None:
    copied(run_dir, finished)
    (run_dir / "run.json").write_text(
        (run_dir / "run.json").read_text().replace('"run_id": "', '"run_id": "0')
    )


def without_checkpoints(run_dir: Path, finished: Path) -> None:
    """Folder of a run that was killed before its first save; the settings are those of the case."""
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
    """Leftovers of a killed preflight and start; an older version wrote the configuration in place."""
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
    Case("named-run", copied, ["--resume", "{run_dir}"], begins_at=4),
    Case("named-step", copied, ["--resume", "{run_dir}/checkpoints/step-00000002"], begins_at=2),
    Case("named-of-another", nothing, ["--resume", "{finished}"], refused=(64, "--resume")),
    Case("from-weights", nothing, ["--init-from", "{finished}"]),
    Case("from-weights-into-a-run", copied, ["--init-from", "{finished}"], refused=(64, "--init-from")),
    Case("both-doors", copied, ["--init-from", "x", "--resume", "y"], refused=(64, "--init-from")),
    Case("fresh-from-weights", copied, ["--fresh", "--init-from", "{finished}"]),
    Case("adopted", without_run_file, begins_at=4),
    Case("of-two-runs", with_a_foreign_checkpoint, refused=(64, "checkpoint")),
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
        flags = [flag.format(finished=finished, run_dir=run_dir) for flag in case.flags]
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
        assert "step-00000006" in checkpoints(found.run_dir)


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
    assert list(from_two) == [1, 2, 3, 4, 5, 6]
    assert not any(
        "continues" in row
        for name in ("named-step", "auto-goes-on")
        for row in metrics(started(name).run_dir)
    )
    # the schedule of four steps decided steps 3 and 4 of the finished run
    assert from_two[3] == went_on[3]


def test_what_a_run_did_after_the_step_it_goes_back_to_is_kept(started: Callable[[str], Started]) -> None:
    found = started("named-step")
    assert checkpoints(found.run_dir) == [
        "abandoned-step-00000004",
        *(f"step-0000000{step}" for step in (2, 4, 6)),
    ]
    kept = (found.run_dir / "metrics-abandoned.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in kept] == metrics(found.finished)[2:]
    (said,) = [line for line in found.ended.lines if "RETURNED to step 2" in line]
    named = ("abandoned-step-00000004", "metrics-abandoned.jsonl", "--resume off")
    assert all(name in said for name in named)


def test_weights_alone_are_taken(started: Callable[[str], Started]) -> None:
    """Moments and place in the data are not, which is said; settings of the other run are not compared."""
    found, drawn = started("from-weights"), started("auto-begins").losses()
    (said,) = [line for line in found.ended.lines if "with the weights of" in line]
    assert "Adam moments" in said
    assert "since the checkpoint" not in found.ended.output
    losses = found.losses()
    assert losses[1] < drawn[1] - 0.1
    assert losses == started("fresh-from-weights").losses()
    assert metrics(found.run_dir)[0]["tokens"] == metrics(found.finished)[0]["tokens"]
    (manifest,) = [read_manifest(step_dir(found.run_dir, 2))]
    other = read_manifest(step_dir(found.finished, 4))
    assert manifest.run_id != other.run_id
    assert manifest.attempt == 1
    assert manifest.began_from is not None
    assert manifest.began_from.path == str(step_dir(found.finished, 4))


def test_moments_begin_at_zero(small: Small, started: Callable[[str], Started], tmp_path: Path) -> None:
    """Moments are zero, as from a checkpoint that has none."""
    whole, bare = started("from-weights"), tmp_path / "bare"
    made = llama_mcore(
        "convert", "--input", whole.finished, "--output", bare, "--to", "native", "--no-verify"
    )
    assert made.exit_code == 0, made.output
    settings = [*small.overrides(tmp_path / "run"), *SETTINGS, f"train.steps={STEPS}"]
    done = train(settings, "--init-from", str(bare))
    assert done.exit_code == 0, done.output
    assert "Adam moments" not in done.output
    assert numbers(tmp_path / "run") == numbers(whole.run_dir)


def test_a_run_that_was_killed_before_its_first_save_begins_with_the_same_weights(
    small: Small, started: Callable[[str], Started], tmp_path: Path
) -> None:
    """The weights are the same without the flag too, never drawn ones."""
    whole = started("from-weights")
    settings = [*small.overrides(tmp_path / "run"), *SETTINGS, f"train.steps={STEPS}"]
    flag = ["--init-from", str(whole.finished)]
    killed = live(Attempt([*settings, *flag], be_killed, step=2, ranks=[0], world_size=1))
    assert killed.codes == [137], killed.output
    assert checkpoints(tmp_path / "run") == []
    run_file = (tmp_path / "run/run.json").read_text()
    again = train(settings)
    assert again.exit_code == 0, again.output
    assert numbers(tmp_path / "run") == numbers(whole.run_dir)
    assert (tmp_path / "run/run.json").read_text() == run_file


@pytest.mark.parametrize(
    "asked", [Start("runs/a"), Start(init_from="b"), Start(fresh=True, accept_data_change=True)]
)
def test_what_counted_when_a_job_began_does_not_when_slurm_puts_it_back(
    asked: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_attempt(tmp_path, AttemptStarted(began=1.0, job="7", host="n", ranks=1, saved=True, step=1))
    for name, value in (("SLURM_JOB_ID", "7"), ("SLURM_RESTART_COUNT", "0")):
        monkeypatch.setenv(name, value)
    assert after_requeue(tmp_path, asked) == asked
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert after_requeue(tmp_path, asked) == Start(accept_data_change=asked.accept_data_change)


def test_checkpoints_say_whose_run_it_is(started: Callable[[str], Started]) -> None:
    """Once, with the names that are not read; a copy under such a name stays where it is."""
    found = started("adopted")
    (of_run, not_read) = [line for line in found.ended.lines if "run.json" in line or "not read" in line]
    run_id = read_manifest(step_dir(found.finished, 4)).run_id
    assert run_id in of_run
    assert "step-best" in not_read
    assert json.loads((found.run_dir / "run.json").read_text())["run_id"] == run_id
    assert (found.run_dir / "checkpoints/step-best/manifest.json").exists()
    # what it did before is told of elsewhere
    assert metrics(found.run_dir)[0]["continues"].endswith("step-00000004")
    assert "LACKS" not in found.ended.output
    audit_run(found.run_dir)


def test_a_stopped_run_from_anothers_weights_goes_on_by_the_same_command(
    small: Small, started: Callable[[str], Started], tmp_path: Path
) -> None:
    """Ctrl-C at step 3, and the checkpoint that it began from is gone by then."""
    whole = started("from-weights")
    source, run_dir = tmp_path / "source", tmp_path / "run"
    shutil.copytree(whole.finished, source)
    settings = [*small.overrides(run_dir), *SETTINGS, f"train.steps={STEPS}", "--init-from", str(source)]
    stopped = live(Attempt(settings, partial(ask, signal.SIGINT), step=3, ranks=[0], world_size=1))
    assert stopped.codes == [75], stopped.output
    assert checkpoints(run_dir) == ["step-00000002", "step-00000003"]
    first = (run_dir / "metrics.jsonl").read_text()
    shutil.rmtree(source)
    again = train(settings)
    assert again.exit_code == 0, again.output
    assert first_steps(run_dir) == [1, 4]
    assert (run_dir / "metrics.jsonl").read_text().startswith(first)
    assert numbers(run_dir) == numbers(whole.run_dir)
    manifests = [read_manifest(run_dir / "checkpoints" / name) for name in checkpoints(run_dir)]
    assert [(manifest.step, manifest.attempt) for manifest in manifests] == [(2, 1), (3, 1), (4, 2), (6, 2)]
    assert {manifest.run_id for manifest in manifests} == {
        json.loads((run_dir / "run.json").read_text())["run_id"]
    }
    shorter = train([*settings, "train.steps=5"])
    assert shorter.exit_code == 0, shorter.output
    assert len(metrics(run_dir)) == STEPS
