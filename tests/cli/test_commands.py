"""llama_mcore.cli: the commands, their scripts in tools/, and how an error ends."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from llama_mcore import __version__, errors
from llama_mcore.checkpoint.paths import room_for
from llama_mcore.cli import app
from llama_mcore.config.load import load_config
from llama_mcore.diagnose.checks_run import free_space
from llama_mcore.distributed.launch_env import RankInfo
from llama_mcore.errors import Problem, report_errors
from tests.checkpoint.tiny import write_checkpoint
from tests.support.errors import is_shown
from tests.support.models import KILOBYTES, overrides, write_tokens
from tests.support.world import ROOT, TIMEOUT_S

ROOT_GROUP = typer.main.get_group(app)
GROUPS = {
    "llama-mcore": ROOT_GROUP,
    "plan": ROOT_GROUP.commands["plan"],
    "benchmark": ROOT_GROUP.commands["benchmark"],
}
COMMANDS = [name for name in ROOT_GROUP.commands if name not in GROUPS]
WITH_OPTIONS = [name for name in COMMANDS if name != "torchrun"]  # which passes everything on, --help too


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(arguments))
    return result.exit_code, result.output


def test_version() -> None:
    assert run("--version") == (0, __version__ + "\n")


def test_help_lists_every_command() -> None:
    code, output = run("--help")
    assert code == 0
    assert all(name in output for name in COMMANDS)


@pytest.mark.parametrize("name", WITH_OPTIONS)
def test_every_command_has_help(name: str) -> None:
    code, output = run(name, "--help")
    assert code == 0
    assert "--debug" in output


@pytest.mark.parametrize("group", GROUPS)
def test_every_option_is_explained_by_a_phrase(group: str) -> None:
    """Help texts stand alone; none continues from the option's name."""
    helps = {
        f"{command.name} {parameter.name}": getattr(parameter, "help", None) or ""
        for command in GROUPS[group].commands.values()
        for parameter in command.params
        if not getattr(parameter, "hidden", False)
    }
    assert len(helps) > 20
    assert [name for name, text in helps.items() if text.partition(" ")[0] in ("", "Of", "That", "As")] == []


def test_an_unknown_command_is_a_usage_error() -> None:
    assert run("trian")[0] == 2


def test_a_missing_option_is_a_usage_error_that_names_it() -> None:
    code, output = run("train")
    assert code == 2
    assert "--config" in output


@pytest.mark.process
@pytest.mark.parametrize("script", ["train", "preprocess_data", "convert_checkpoint"])
def test_each_script_is_its_command(script: str) -> None:
    path = ROOT / "tools" / f"{script}.py"
    assert len(path.read_text().splitlines()) < 60
    command = [sys.executable, path, "--help"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert result.returncode == 0
    assert "--debug" in result.stdout
    assert result.stdout.startswith((f"Usage: {script}.py --config", f"Usage: {script}.py [OPTIONS]"))


@pytest.mark.process
@pytest.mark.parametrize(("argument", "code"), [("--help", 0), ("nonsense", 2)])
def test_the_demo_touches_nothing_when_it_is_only_asked(argument: str, code: int, tmp_path: Path) -> None:
    (tmp_path / "tools").mkdir()
    script = shutil.copy(ROOT / "tools/demo.py", tmp_path / "tools")
    earlier = tmp_path / "runs/demo/corpus"
    earlier.mkdir(parents=True)
    command = [sys.executable, script, argument]
    result = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert (result.returncode, earlier.is_dir()) == (code, True)


@pytest.mark.process
@pytest.mark.parametrize("tool", sorted((ROOT / "tools").glob("*.py")), ids=lambda tool: tool.stem)
def test_outside_the_environment_a_tool_says_so_in_a_line(tool: Path) -> None:
    without_packages = [sys.executable, "-S", tool, "--help"]
    result = subprocess.run(without_packages, capture_output=True, text=True, timeout=TIMEOUT_S, env={})
    assert (result.returncode, result.stdout) == (69, "")
    assert "make venv" in result.stderr
    assert result.stderr.count("\n") == 1


def dry_run(*arguments: str) -> tuple[int, list[str], str]:
    """Exit code, lines on stdout, and stderr."""
    result = CliRunner().invoke(app, ["train", "--config", "tiny", "--dry-run", *arguments])
    return result.exit_code, result.stdout.splitlines(), result.stderr


def data_in(folder: Path, windows: int = 9) -> list[str]:
    write_tokens(folder / "train", [np.arange(windows * 256 + 1) % 4096])
    settings = ["data.valid=null", "eval.interval=0", "data.tokenizer=null", "data.epochs=9999"]
    return [f"data.train={folder / 'train'}", f"run.dir={folder / 'run'}", *settings]


def test_a_dry_run_prints_the_plan_and_starts_nothing(tmp_path: Path) -> None:
    code, lines, _ = dry_run("--world-size", "4", *data_in(tmp_path), "zero.stage=2")
    output = "\n".join(lines)
    assert code == 0
    assert "4 ranks = tp 2 x dp 2" in output
    assert "ZeRO-2" in output
    assert f"{tmp_path / 'run'}  new" in output
    assert "available" in output  # the table of the data
    assert lines[-1].startswith("Ready: 410K tokens on 4 ranks")
    assert not (tmp_path / "run").exists()


MISSING = ("data.train", "nowhere")


def test_the_conclusion_of_a_dry_run_is_its_last_word_and_true(tmp_path: Path) -> None:
    def refused(code: int, problem: tuple[str, object], *settings: str) -> list[str]:
        found, lines, errors = dry_run(*settings)
        assert (found, is_shown(errors, *problem), "Traceback" in errors) == (code, True, False), errors
        assert lines[-1].startswith("Not ready: ")
        assert "Ready: " not in "\n".join(lines)
        return lines

    settings = data_in(tmp_path)
    refused(65, ("source train", "1,600 windows"), *settings, "data.epochs=1")
    refused(66, MISSING, *settings, "data.train=nowhere")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").touch()
    lines = refused(64, ("run.dir", tmp_path / "run"), *settings)
    assert f"{tmp_path / 'run'}  is not a run's folder" in "\n".join(lines)
    refused(64, MISSING, *settings, "data.train=nowhere")
    assert dry_run(*settings, "--fresh")[0] == 0


def test_a_dry_run_says_where_the_run_would_begin(tmp_path: Path) -> None:
    write_tokens(tmp_path / "train", [np.arange(1000) % 2])
    settings = [f"data.train={tmp_path / 'train'}", "data.valid=null", "eval.interval=0", "data.epochs=9999"]
    settings += [
        "data.tokenizer=null",
        "data.eod_token=1",
        f"run.dir={tmp_path / 'run'}",
        *overrides(KILOBYTES),
    ]
    mine, other = write_checkpoint(tmp_path / "run"), write_checkpoint(tmp_path / "other", run_id="beef")
    mine.with_name("step-best").mkdir()
    _, lines, _ = dry_run(*settings)
    (begins,) = [line for line in lines if line.startswith("start: ")]
    assert begins == f"start: continues at step 4 from {mine}"
    assert any("not read: step-best" in line for line in lines)
    _, lines, _ = dry_run(*settings, "--init-from", str(other), f"run.dir={tmp_path / 'new'}")
    assert f"start: begins with the weights of {other}" in lines
    for name in ("--init-from", "--resume"):
        code, _, errors = dry_run(*settings, name, str(other))
        assert (code, is_shown(errors, name, other)) == (64, True), errors
    assert run("train", "--config", "tiny", "--init-from", "x", "--resume", "y")[0] == 64


def test_a_dry_run_looks_where_checkpoints_will_lie_and_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refusal(*settings: str) -> str:
        before = sorted(tmp_path.rglob("*"))
        code, lines, errors = dry_run(*data_in(tmp_path), *settings)
        assert (code, lines[-1][:10], sorted(tmp_path.rglob("*"))) == (73, "Not ready:", before), errors
        return errors

    def status(path: Path) -> object:
        flag = os.ST_RDONLY if path == read_only else 0
        return SimpleNamespace(f_flag=flag, f_frsize=1, f_blocks=0, f_bfree=0, f_bavail=1 << 40)

    def usage(path: Path) -> object:
        return disk_usage(path)._replace(free=free)

    data_in(tmp_path)
    scratch = tmp_path / "run/checkpoints"
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for where in ("file", "file/run", "link/run"):
        errors = refusal(f"run.dir={tmp_path / where}")
        assert errors.count("Not a directory") == 1
        assert str(tmp_path / where) in errors
    with monkeypatch.context() as context:
        context.setattr(os, "access", lambda path, mode: False)
        assert f"{tmp_path} cannot be written (Permission denied)" in refusal()
    with monkeypatch.context() as context:
        context.setattr(os, "statvfs", status)
        for read_only in (tmp_path, scratch):
            read_only.mkdir(parents=True, exist_ok=True)
            assert f"{read_only} cannot be written (Read-only file system)" in refusal()
    disk_usage, checkpoint = shutil.disk_usage, room_for(1, load_config("tiny", []).model.num_params())
    monkeypatch.setattr(shutil, "disk_usage", usage)
    settings = ["checkpoint.keep=3", "checkpoint.interval=10"]
    free = 4 * checkpoint - 9
    assert "4 more checkpoints need 277.3 MiB" in refusal(*settings)
    assert dry_run(*data_in(tmp_path), "checkpoint.keep=2", *settings[1:])[0] == 0
    assert dry_run(*data_in(tmp_path), *settings, "checkpoint.interval=50")[0] == 0  # it writes only two
    (scratch / "step-00000010").mkdir()
    there = load_config("tiny", [f"run.dir={scratch.parent}", *settings])
    assert free_space(there).status == "ok"  # one of the four is there
    assert "4 more checkpoints need" in refusal(*settings, "--fresh")
    free = checkpoint - 1
    assert "1 more checkpoint needs" in refusal(*settings, "checkpoint.interval=100", "--fresh")


@pytest.mark.parametrize("size", ["0", "-2"])
def test_a_number_of_ranks_is_at_least_one(size: str) -> None:
    code, _, errors = dry_run("--world-size", size)
    assert (code, is_shown(errors, "--world-size", size, remedy=False)) == (64, True)


def test_a_number_of_ranks_is_for_a_dry_run(tmp_path: Path) -> None:
    code, output = run("train", "--config", "tiny", "--world-size", "2", f"run.dir={tmp_path / 'run'}")
    assert (code, is_shown(output, "--world-size", 2)) == (64, True)


def test_a_dry_run_without_a_world_plans_for_one_tensor_parallel_group() -> None:
    assert "2 ranks = tp 2 x dp 1" in run("train", "--config", "tiny", "--dry-run")[1]


def test_a_dry_run_checks_for_the_ranks_that_its_launcher_started(monkeypatch: pytest.MonkeyPatch) -> None:
    place = RankInfo(rank=3, world_size=4, local_rank=0, master_address="n1", master_port=29500)
    for name, value in place.variables().items():
        monkeypatch.setenv(name, value)
    code, output = run("train", "--config", "tiny", "--dry-run", "parallel.tp=3")
    assert (code, is_shown(output, "world size", 4)) == (64, True)
    assert "2 ranks" in run("train", "--config", "tiny", "--dry-run", "--world-size", "2")[1]


def test_a_process_alone_is_one_rank() -> None:
    code, output = run("train", "--config", "tiny")
    assert (code, is_shown(output, "world size", 1)) == (64, True)
    assert "start 2 ranks" in output


def test_a_launcher_that_is_not_understood_ends_with_69(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    code, output = run("train", "--config", "tiny", "--dry-run")
    assert (code, is_shown(output, "WORLD_SIZE", "(not set)")) == (69, True)


def test_a_wrong_setting_exits_with_64() -> None:
    code, output = run("train", "--config", "tiny", "--dry-run", "--world-size", "3")
    assert (code, is_shown(output, "world size", 3)) == (64, True)


def test_a_missing_file_exits_with_66() -> None:
    code, output = run("train", "--config", "no-such-file.yaml")
    assert (code, is_shown(output, "--config", "no-such-file.yaml")) == (66, True)


@pytest.mark.parametrize(
    "words",
    [
        ["audit-data", "nowhere"],
        ["inspect-checkpoint", "nowhere"],
        ["inspect-checkpoint", "nowhere", "--diff", "."],
        ["compare-checkpoints", "nowhere", "."],
        ["compare-checkpoints", ".", "nowhere"],
        ["generate", "--checkpoint", "nowhere", "--prompt", "a"],
        ["convert", "--input", "nowhere", "--output", "out", "--to", "hf"],
        ["inspect-dataset", "nowhere"],
        ["train-tokenizer", "--input", "nowhere", "--output", "out"],
    ],
    ids=lambda words: " ".join(words),
)
def test_what_is_not_there_is_named_in_one_wording(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, output = run(*words)
    assert (code, "nowhere" in output, "no such file or folder" in output) == (66, True, True), output
    assert list(tmp_path.iterdir()) == []


KINDS = [
    (errors.ConfigError, 64),
    (errors.DataError, 65),
    (errors.CheckpointError, 65),
    (errors.MissingInputError, 66),
    (errors.PreflightError, 69),
    (errors.OutputError, 73),
]


@pytest.mark.parametrize(("kind", "code"), KINDS)
def test_an_error_becomes_one_message_and_its_exit_code(
    kind: type[errors.LlamaMcoreError],
    code: int,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(SystemExit) as exit_info, report_errors():
        raise kind(Problem("train.steps", 0, "must be at least 1", "set it to 1"))
    assert exit_info.value.code == code
    message = capsys.readouterr().err
    assert message == f"{kind.title}: train.steps = 0: must be at least 1; set it to 1\n"


def test_one_rank_of_a_node_speaks(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit), report_errors():
        raise errors.ConfigError(Problem("train.steps", 0, "must be at least 1"))
    assert capsys.readouterr().err == ""


def test_a_defect_of_ours_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError), report_errors():
        _ = 1 // 0
