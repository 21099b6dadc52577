"""llama_mcore.checkpoint.start and lineage: what a start begins from, and whose checkpoints it takes."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from llama_mcore.checkpoint.paths import MANIFEST, checkpoints_dir, step_dir
from llama_mcore.checkpoint.run_dir import (
    RUN_FILE,
    Lineage,
    complete_checkpoints,
    find_checkpoint,
    held_in,
    new_lineage,
    not_foreign,
    origin_of,
    read_lineage,
    write_lineage,
)
from llama_mcore.checkpoint.start import Outlook, Start, StartPlan, outlook, plan_start
from llama_mcore.checkpoint.train_state import TrainState
from llama_mcore.config.load import dump_config
from llama_mcore.config.schema import RunConfig
from llama_mcore.errors import CheckpointError, ConfigError, LlamaMcoreError, MissingInputError
from llama_mcore.train.resume import archive_checkpoints_after
from tests.checkpoint.damage import edit_manifest
from tests.checkpoint.tiny import RUN_ID, write_checkpoint
from tests.support import models
from tests.support.errors import refused

OTHER = "beef"


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    return folder


@pytest.fixture
def run(run_dir: Path) -> RunConfig:
    return models.run_config(run_dir, models.KILOBYTES)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A checkpoint of another run."""
    return write_checkpoint(tmp_path / "other", 3, run_id=OTHER)


def begun(run_dir: Path, source: Path | None = None) -> Lineage:
    """Files of a run that has no checkpoint yet."""
    lineage = new_lineage(RUN_ID, origin_of(source) if source else None)
    write_lineage(run_dir, lineage)
    return lineage


def test_what_is_written_is_read(run_dir: Path, source: Path) -> None:
    assert read_lineage(run_dir) is None
    assert read_lineage(run_dir / "nowhere") is None
    lineage = begun(run_dir, source)
    assert read_lineage(run_dir) == lineage
    assert lineage.began_from is not None
    assert (lineage.began_from.run_id, lineage.began_from.step) == (OTHER, 3)
    assert [path.name for path in run_dir.iterdir()] == [RUN_FILE]


def half(path: Path) -> None:
    path.write_text(path.read_text()[:30])


def fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def dangling(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def unknown_field(path: Path) -> None:
    path.write_text(path.read_text().replace('"began"', '"begun"'))


@pytest.mark.parametrize("spoil", [half, fifo, folder, dangling, unknown_field])
def test_a_damaged_run_file_is_refused(run: RunConfig, run_dir: Path, spoil: Callable[[Path], None]) -> None:
    begun(run_dir)
    write_checkpoint(run_dir)
    spoil(run_dir / RUN_FILE)
    for look in (lambda: plan_start(run, Start()), lambda: find_checkpoint(run_dir)):
        with refused(CheckpointError, RUN_FILE, run_dir / RUN_FILE):
            look()


def test_checkpoints_of_one_run_say_which_it_is(run: RunConfig, run_dir: Path) -> None:
    for step in (4, 8):
        write_checkpoint(run_dir, step)
    found = outlook(run)
    assert str(found) == f"continues at step 8 from {step_dir(run_dir, 8)}"
    assert found.plan.lineage.run_id == RUN_ID
    assert [RUN_ID in remark and RUN_FILE in remark for remark in found.plan.remarks()] == [True]
    begun(run_dir)
    assert outlook(run).plan.remarks() == []


def test_checkpoints_of_several_runs_are_refused(run: RunConfig, run_dir: Path) -> None:
    mine, other = write_checkpoint(run_dir, 4), write_checkpoint(run_dir, 8, run_id=OTHER)
    for look in (lambda: plan_start(run, Start()), lambda: find_checkpoint(run_dir)):
        for path in (mine, other):
            with refused(ConfigError, "checkpoint", path):
                look()


def test_a_checkpoint_of_another_run_is_refused_and_never_taken(run: RunConfig, run_dir: Path) -> None:
    begun(run_dir)
    mine, other = write_checkpoint(run_dir, 4), write_checkpoint(run_dir, 8, run_id=OTHER)
    with refused(ConfigError, "checkpoint", other) as caught:
        plan_start(run, Start())
    assert OTHER in str(caught.value)
    assert str(checkpoints_dir(run_dir)) in str(caught.value)
    assert find_checkpoint(run_dir) == mine
    assert complete_checkpoints(run_dir) == [mine]
    assert held_in(run_dir).foreign == {other: OTHER}


def test_what_cannot_be_read_is_nobody_elses(run: RunConfig, run_dir: Path) -> None:
    begun(run_dir)
    mine, damaged = write_checkpoint(run_dir, 4), write_checkpoint(run_dir, 8, run_id=OTHER)
    (damaged / MANIFEST).write_text("{")
    assert plan_start(run, Start()).folders == [mine, damaged]
    assert outlook(run).checkpoint == mine


def test_archived_checkpoints_are_the_runs_own(run_dir: Path) -> None:
    for step, run_id in ((4, RUN_ID), (6, OTHER), (8, RUN_ID), (10, OTHER)):
        write_checkpoint(run_dir, step, run_id=run_id)
    (step_dir(run_dir, 10) / MANIFEST).write_text("{")
    aside = archive_checkpoints_after(run_dir, TrainState(step=4, run_id=RUN_ID))
    names = ["step-00000004", "step-00000006", "abandoned-step-00000008", "abandoned-step-00000010"]
    assert sorted(path.name for path in checkpoints_dir(run_dir).iterdir()) == sorted(names)
    assert [path.name for path in aside] == names[2:]
    assert not_foreign(run_dir, OTHER) == [step_dir(run_dir, 6)]


def test_names_that_are_not_read_are_said(run: RunConfig, run_dir: Path) -> None:
    newest = write_checkpoint(run_dir, 4)
    for name in ("step-best", "step-55"):
        shutil.copytree(newest, checkpoints_dir(run_dir) / name)
    found = outlook(run)
    assert found.checkpoint == newest
    assert [("step-55, step-best" in remark) for remark in found.plan.remarks()] == [False, True]


# --resume PATH: the run's own.


def test_an_own_checkpoint_is_gone_back_to(run: RunConfig, run_dir: Path, tmp_path: Path) -> None:
    begun(run_dir)
    for step in (4, 8):
        write_checkpoint(run_dir, step)
    copy = Path(shutil.copytree(step_dir(run_dir, 4), tmp_path / "kept"))
    for path in (step_dir(run_dir, 4), copy):
        plan = plan_start(run, Start(str(path)))
        assert (plan.folders, plan.goes_back) == ([path], True)
    assert str(outlook(run, Start(str(copy)))) == f"returns to step 4 from {copy}"
    assert not plan_start(run, Start(str(run_dir))).goes_back


def test_a_backup_of_the_run_is_its_own(run: RunConfig, run_dir: Path, tmp_path: Path) -> None:
    begun(run_dir)
    write_checkpoint(tmp_path / "backup", 8)
    assert plan_start(run, Start(str(tmp_path / "backup"))).folders == [step_dir(tmp_path / "backup", 8)]


@pytest.mark.parametrize("has_run", [True, False])
def test_another_runs_checkpoint_is_refused_with_both_ways_out(
    run: RunConfig, run_dir: Path, source: Path, has_run: bool
) -> None:
    if has_run:
        begun(run_dir)
    for path in (source, source.parents[1]):
        with refused(ConfigError, "--resume", path) as caught:
            plan_start(run, Start(str(path)))
        assert f"--init-from {source}" in str(caught.value)
        assert f"run.dir={source.parents[1]}" in str(caught.value)


def test_behind_a_damaged_checkpoint_no_other_run_is_taken(
    run: RunConfig, run_dir: Path, source: Path
) -> None:
    begun(run_dir)
    newest = write_checkpoint(source.parents[1], 5, run_id=OTHER)
    (newest / MANIFEST).write_text("{")
    with refused(ConfigError, "--resume", source.parents[1]):
        plan_start(run, Start(str(source.parents[1])))
    with refused(CheckpointError, "--resume", newest):
        outlook(run, Start(str(newest)))


def test_a_converted_state_is_told_its_place(run: RunConfig, source: Path, tmp_path: Path) -> None:
    converted = source.rename(tmp_path / "converted")
    with refused(ConfigError, "--resume", converted) as caught:
        plan_start(run, Start(str(converted)))
    assert "checkpoints/step-00000003" in str(caught.value)


def test_a_checkpoint_that_is_not_there_is_missing(run: RunConfig, tmp_path: Path) -> None:
    for start in (Start(str(tmp_path / "nowhere")), Start(str(tmp_path))):
        with pytest.raises(MissingInputError):
            plan_start(run, start)


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"resume": "x", "init_from": "y"}, "--init-from"),
        ({"resume": "never", "init_from": "y"}, "--init-from"),
        ({"resume": "x", "fresh": True}, "--fresh"),
    ],
)
def test_options_that_exclude_each_other_are_both_named(given: dict, field: str) -> None:
    with refused(ConfigError, field) as caught:
        Start(**given)
    assert f"--resume {given['resume']}" in str(caught.value)
    Start(resume="never", fresh=True)
    Start(init_from="y", fresh=True)


# --init-from PATH: somebody's weights.


def begins_with(plan: StartPlan) -> tuple[Path | None, str]:
    origin = plan.lineage.began_from
    return plan.init_from, origin.path if origin else ""


def test_a_run_begins_with_anothers_weights(run: RunConfig, source: Path) -> None:
    for path in (source, source.parents[1]):
        start = Start(init_from=str(path))
        plan = plan_start(run, start)
        assert begins_with(plan) == (source, str(source))
        assert plan.lineage.run_id != OTHER
        assert str(outlook(run, start)) == f"begins with the weights of {source}"


def test_a_folder_with_any_name_can_be_begun_from(run: RunConfig, source: Path, tmp_path: Path) -> None:
    odd = source.rename(tmp_path / os.fsdecode(b"\xff"))
    assert begins_with(plan_start(run, Start(init_from=str(odd)))) == (odd, f"{tmp_path}/\\xff")


def test_the_same_command_goes_on(run: RunConfig, run_dir: Path, source: Path, tmp_path: Path) -> None:
    lineage = begun(run_dir, source)
    newest = write_checkpoint(run_dir)
    for path in (source, source.parents[1]):
        plan = plan_start(run, Start(init_from=str(path)))
        assert (plan.lineage, plan.folders, plan.init_from) == (lineage, [newest], None)
    moved = source.rename(tmp_path / "moved")
    for path in (source, source.parents[1], moved):
        assert plan_start(run, Start(init_from=str(path))).folders == [newest]


@pytest.mark.parametrize("has_steps", [True, False])
@pytest.mark.parametrize("drawn", [True, False])
def test_a_run_that_began_from_something_else_is_refused(
    run: RunConfig, run_dir: Path, source: Path, tmp_path: Path, has_steps: bool, drawn: bool
) -> None:
    begun(run_dir, None if drawn else source)
    if has_steps:
        write_checkpoint(run_dir)
    another = write_checkpoint(tmp_path / "another", 3, run_id=OTHER, seed=1)
    for path in (another, tmp_path / "nowhere"):
        with refused(ConfigError, "--init-from", path) as caught:
            plan_start(run, Start(init_from=str(path)))
        assert all(
            way in str(caught.value) for way in ("leave --init-from off", "another run.dir", "--fresh")
        )


def test_a_missing_or_foreign_source_is_missing(run: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf/config.json").write_text("{}")
    for path in (tmp_path / "nowhere", tmp_path / "hf"):
        with pytest.raises(MissingInputError):
            plan_start(run, Start(init_from=str(path)))


def test_somebody_elses_folder_is_not_begun_in(run: RunConfig, run_dir: Path, source: Path) -> None:
    (run_dir / "thesis.txt").touch()
    with refused(ConfigError, "run.dir", run_dir):
        plan_start(run, Start(init_from=str(source)))


def test_a_damaged_source_is_named(run: RunConfig, source: Path) -> None:
    next(source.glob("*.safetensors")).write_bytes(b"")
    with refused(CheckpointError, "--init-from", source):
        outlook(run, Start(init_from=str(source)))


def test_fresh_begins_from_what_it_does_not_move(run: RunConfig, run_dir: Path, source: Path) -> None:
    begun(run_dir)
    own = write_checkpoint(run_dir)
    plan = plan_start(run, Start(init_from=str(source), fresh=True))
    assert plan.fresh
    assert begins_with(plan) == (source, str(source))
    assert plan.lineage.run_id != RUN_ID
    assert plan_start(run, Start(fresh=True)).newest_first() == []
    with refused(ConfigError, "--init-from", own):
        plan_start(run, Start(init_from=str(own), fresh=True))


# A run that ended before its first checkpoint.


def test_a_plain_start_begins_again_with_the_same_weights(
    run: RunConfig, run_dir: Path, source: Path
) -> None:
    lineage = begun(run_dir, source)
    (run_dir / "config.yaml").write_text(dump_config(run))
    for start in (Start(), Start(init_from=str(source))):
        plan = plan_start(run, start)
        assert plan.lineage == lineage
        assert plan.newest_first() == [source]


def test_a_plain_start_of_a_drawn_run_draws_again(run: RunConfig, run_dir: Path) -> None:
    lineage = begun(run_dir)
    plan = plan_start(run, Start())
    assert (plan.lineage, plan.newest_first()) == (lineage, [])


def changed(source: Path) -> None:
    edit_manifest(source, lambda manifest: manifest.update(lr=1.0))


def cut(source: Path) -> None:
    (source / MANIFEST).write_text("{")


@pytest.mark.parametrize(
    ("spoil", "kind"),
    [(shutil.rmtree, MissingInputError), (changed, CheckpointError), (cut, CheckpointError)],
    ids=["gone", "changed", "cut"],
)
def test_a_plain_start_never_begins_with_other_weights(
    run: RunConfig, run_dir: Path, source: Path, spoil: Callable[[Path], object], kind: type[LlamaMcoreError]
) -> None:
    begun(run_dir, source)
    spoil(source)
    with refused(kind, "checkpoint", source) as caught:
        plan_start(run, Start())
    assert "--init-from" in str(caught.value)
    assert "--fresh" in str(caught.value)


def test_outlook_names_what_is_moved_aside(run: RunConfig, run_dir: Path) -> None:
    write_checkpoint(run_dir)
    found: Outlook = outlook(run, Start(fresh=True))
    assert (found.checkpoint, "aside" in str(found)) == (None, True)


@pytest.mark.parametrize(
    ("asked", "command"),
    [
        (Start(), "the same command"),
        (Start(init_from="x"), "the same command"),
        (Start(resume="x"), "the same command without --resume"),
        (Start(resume="never", fresh=True), "the same command without --resume and --fresh"),
    ],
)
def test_command_to_continue(asked: Start, command: str) -> None:
    assert asked.command_to_continue == command
