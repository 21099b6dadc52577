"""llama_mcore.launch.slurm: bash, shellcheck and the shipped scripts judge what it writes."""

import json
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from llama_mcore.cli import app
from llama_mcore.data.manifest import build_manifest, write_manifest
from llama_mcore.errors import ConfigError, DataError, MissingInputError, OutputError
from llama_mcore.launch.slurm import (
    LONGEST_NAME,
    LONGEST_WARNING_S,
    SlurmJob,
    bash_word,
    job_script,
    write_script,
)
from tests.support.errors import check_problem, is_shown, refused
from tests.support.models import write_tokens
from tests.support.world import ROOT, TIMEOUT_S

SHIPPED = {"7b": 16, "13b": 32, "33b": 128, "65b": 256}
NASTY = [
    "a b",
    "$HOME",
    "`id`",
    "$(id)",
    "it's",
    'say "so"',
    "back\\slash",
    "\\",
    "two\nlines",
    "carriage\r\nreturn",
    "tab\t",
    "",
    "-x",
    "--",
    "~",
    "*",
    "a;b&c|d>e<f",
    "#no comment",
    "!history",
    "donn\u00e9es",
    "\u4e2d\u6587",
    "\u2018quoted\u2019 \u201ctoo\u201d",
    "\u00a0",
    "\u202eright to left",
    "{a,b}",
    "[a-z]",
    "a=b",
    "\x1b[31m",
    "\x7f",
]
# whatever a command line can hold: no NUL, and nothing that is not UTF-8
TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=30)
# JSON writes what is beyond as two halves, which YAML takes for two characters
SHORT_TEXT = st.text(
    st.characters(max_codepoint=0xFFFF, exclude_characters="\0", exclude_categories=["Cs"]), max_size=30
)
CASES = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def data(folder: Path) -> list[str]:
    """Settings of data that is there, and suffices."""
    for name in ("train", "valid"):
        if not (folder / f"{name}.bin").exists():
            write_tokens(folder / name, [np.arange(1000)])
            write_manifest(folder / name, build_manifest(folder / name))
    return [
        f"data.train={folder / 'train'}",
        f"data.valid={folder / 'valid'}",
        "data.epochs=9999",
        "data.tokenizer=",
        f"run.dir={folder / 'llama-run'}",
    ]


def tiny(folder: Path, *overrides: str, **fields: object) -> str:
    return job_script(
        "tiny", [*data(folder), *overrides], SlurmJob(**{"nodes": 2, "gpus_per_node": 1, **fields})
    )


def options(script: str) -> dict[str, str]:
    lines = (line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH"))
    return {name: value for name, _, value in (line.partition("=") for line in lines)}


def words_of(command: str) -> list[str]:
    """Arguments of `train` as bash reads them."""
    show = [sys.executable, "-c", "import json, sys; print(json.dumps(sys.argv[1:]))"]
    program = f'train() {{ "${{SHOW[@]}}" "$@"; }}\nSHOW=({" ".join(map(bash_word, show))})\n{command}'
    done = subprocess.run(
        ["bash", "-c", program], capture_output=True, text=True, check=True, timeout=TIMEOUT_S
    )
    return json.loads(done.stdout)


def found_by_shellcheck(script: str) -> str:
    command = [Path(sys.prefix, "bin", "shellcheck"), "-x", "-"]
    return subprocess.run(
        command, input=script, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S
    ).stdout


@pytest.mark.parametrize("size", SHIPPED)
def test_the_shipped_sizes_give_the_shipped_settings(size: str) -> None:
    script = job_script(size, [], SlurmJob(SHIPPED[size]), data_later=True)
    shipped = (ROOT / "slurm" / f"{size}.sh").read_text()
    assert options(script) == options(shipped)
    code = [line for line in shipped.splitlines() if line and not line.startswith("#")]
    *rendered, train = [line for line in script.splitlines() if line and not line.startswith("#")]
    assert rendered == code[:-1]
    assert train.startswith(code[-1].removesuffix('"$@"'))
    assert train.endswith('"$@"')


def test_what_is_asked_for_is_there(tmp_path: Path) -> None:
    fields = {
        "partition": "gpu,big",
        "account": "lab@x",
        "qos": "high",
        "time": "2-00",
        "signal_seconds": 600,
    }
    found = options(tiny(tmp_path, job_name="my job", **fields))
    assert found["partition"] == "gpu,big"
    assert found["account"] == "lab@x"
    assert found["qos"] == "high"
    assert found["time"] == "2-00"
    assert found["signal"] == "B:USR1@600"
    assert found["job-name"] == '"my job"'
    assert (found["nodes"], found["gpus-per-node"]) == ("2", "1")


def test_a_job_is_called_like_the_folder_of_its_run(tmp_path: Path) -> None:
    assert options(tiny(tmp_path))["job-name"] == "llama-run"


@pytest.mark.process
def test_every_text_is_one_word_of_bash() -> None:
    assert words_of(" ".join(["train", *map(bash_word, NASTY)])) == NASTY


@pytest.mark.parametrize(
    ("limit", "seconds"),
    [
        ("4", 240),
        ("4:30", 270),
        ("1:00:05", 3605),
        ("0-1", 3600),
        ("0-1:30", 5400),
        ("0-2:00:01", 7201),
    ],
)
def test_time_limits_in_all_forms(tmp_path: Path, limit: str, seconds: int) -> None:
    """The signal must come before: the one second that decides says how the limit is read."""
    tiny(tmp_path, time=limit, signal_seconds=seconds - 1)
    with refused(ConfigError, "--signal-seconds", seconds, remedy=False):
        tiny(tmp_path, time=limit, signal_seconds=seconds)


@pytest.mark.parametrize("limit", ["1-1", "1-0:01", "1-0:00:01", "0", "UNLIMITED"])
def test_long_limits_and_none_leave_time_for_the_longest_warning(tmp_path: Path, limit: str) -> None:
    tiny(tmp_path, time=limit, signal_seconds=LONGEST_WARNING_S)


@pytest.mark.process
@CASES
@given(st.lists(TEXT, min_size=1, max_size=20))
def test_any_text_is_one_word_of_bash(texts: list[str]) -> None:
    assert words_of(" ".join(["train", *map(bash_word, texts)])) == texts


@pytest.mark.process
def test_shellcheck_has_nothing_against_any_ascii_character() -> None:
    characters = [chr(code) for code in range(1, 128)]
    words = [*NASTY, *characters, *(f"a{c}b {c}" for c in characters)]
    script = "#!/usr/bin/env bash\nprintf '%s' " + " ".join(map(bash_word, words)) + "\n"
    assert found_by_shellcheck(script) == ""


def as_sbatch_reads(value: str) -> str:
    """Slurm 22.05, src/sbatch/opt.c, _get_argument: quotes, a backslash before anything, # for a comment."""
    argument, quote, escaped = "", "", False
    for character in value:
        if escaped:
            argument, escaped = argument + character, False
        elif character == "\\":
            escaped = True
        elif character == quote:
            quote = ""
        elif not quote and character in "\"'":
            quote = character
        elif not quote and (character.isspace() or character == "#"):
            break
        else:
            argument += character
    assert not quote
    return argument


@pytest.mark.process
@CASES
@given(name=TEXT.filter(bool), text=SHORT_TEXT)
@example(name="a \"b\\c'd # e", text="$(x)\n")
@example(name="donn\u00e9es \u4e2d", text="\u2019")
@example(name="-x", text="-x")
@example(name="$HOME `x` %j", text="")
@example(name="a/b", text="")
@example(name="a\u2028#SBATCH --nodes=9", text="")
def test_names_and_values_are_safe_or_refused(name: str, text: str, tmp_path: Path) -> None:
    override = "run.dir=" + json.dumps(f"runs/{text}x")
    if not name.isprintable() or "/" in name or len(name.encode()) > LONGEST_NAME:
        with refused(ConfigError, "--job-name", name):
            tiny(tmp_path, override, job_name=name)
        return
    script = tiny(tmp_path, override, job_name=name)
    assert as_sbatch_reads(options(script)["job-name"]) == name
    assert len([line for line in script.split("\n") if line.startswith("#SBATCH")]) == 11
    assert words_of(script.split("\n")[-2])[2:] == [*data(tmp_path), override]
    checked = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert (checked.returncode, checked.stderr) == (0, "")
    assert found_by_shellcheck(script) == ""


@pytest.mark.process
def test_a_file_is_named_from_the_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(ROOT / "llama_mcore" / "configs" / "tiny.yaml", tmp_path / "-my run.yaml")
    monkeypatch.chdir(tmp_path)
    script = job_script("-my run.yaml", data(tmp_path), SlurmJob(2, 1))
    assert words_of(script.splitlines()[-1])[1] == str(tmp_path / "-my run.yaml")


def test_all_problems_are_said_at_once(tmp_path: Path) -> None:
    fields = {"time": "tomorrow", "signal_seconds": 0, "job_name": "a\nb", "partition": "gpu big", "nodes": 3}
    with pytest.raises(ConfigError) as error:
        tiny(tmp_path, "data.train=nowhere", "zero.config=nothing.json", "optim.warmup_steps=99999", **fields)
    problems = {problem.field: str(problem.value) for problem in error.value.problems}
    assert problems.items() >= {
        ("--time", "tomorrow"),
        ("--signal-seconds", "0"),
        ("--job-name", "a\nb"),
        ("--partition", "gpu big"),
        ("world size", "3"),
        ("optim.warmup_steps", "99999"),
    }
    assert "nowhere.bin" in str(error.value)


@pytest.mark.parametrize(
    ("override", "fields", "field", "value"),
    [
        ("zero.config=nothing.json", {}, "zero.config", "nothing.json"),
        ("train.setps=3", {"time": "never"}, "train.setps", "3"),
        ("train.setps=3", {"time": "never"}, "--time", "never"),
        ("run.seed=1", {"nodes": 0}, "--nodes", 0),
        ("run.seed=1", {"gpus_per_node": -1}, "--gpus-per-node", -1),
        ("run.seed=1", {"account": "-x y"}, "--account", "-x y"),
        ("run.seed=1", {"qos": "a\n#SBATCH --nodes=9"}, "--qos", "a\n#SBATCH --nodes=9"),
        ("run.seed=1", {"signal_seconds": 65536}, "--signal-seconds", 65536),
        ("run.seed=1", {"job_name": "x" * (LONGEST_NAME + 1)}, "--job-name", "x" * (LONGEST_NAME + 1)),
        ("run.dir=/", {}, "--job-name", ""),
        ("run.dir=a\udcffb", {}, "override", r"'run.dir=a\udcffb'"),
        ('run.dir="a\\ud800b"', {"job_name": "x"}, "run.dir", r"'a\ud800b'"),
    ],
)
def test_what_cannot_run_is_refused(
    override: str, fields: dict[str, object], field: str, value: object, tmp_path: Path
) -> None:
    with refused(ConfigError, field, value, remedy=False):
        tiny(tmp_path, override, **fields)


@pytest.mark.parametrize("time", ["90", "90:30", "12:00:00", "2-12", "2-12:30", "2-12:30:00", "UNLIMITED"])
def test_every_form_of_a_time_limit_is_known(time: str, tmp_path: Path) -> None:
    assert options(tiny(tmp_path, time=time))["time"] == time


def test_inputs_that_are_missing_are_named(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError) as error:
        tiny(tmp_path, "data.train=nowhere")
    assert "nowhere.bin" in str(error.value)
    assert "nowhere.idx" in str(error.value)


def test_the_data_is_looked_into(tmp_path: Path) -> None:
    with refused(DataError, "source train", "1,600 windows"):
        tiny(tmp_path, "data.epochs=1")
    write_manifest(tmp_path / "train", build_manifest(tmp_path / "train", vocab_size=999_999))
    with refused(DataError, "dataset", tmp_path / "train"):
        tiny(tmp_path)
    (tmp_path / "train.bin").write_bytes(b"cut")
    with pytest.raises(DataError, match=r"train\.bin"):
        tiny(tmp_path)


def test_a_script_is_written_before_the_data_if_that_is_said(tmp_path: Path) -> None:
    command = ["slurm", "--config=tiny", "--nodes=2", "--gpus-per-node=1", f"data.train={tmp_path}/later"]
    command += ["data.epochs=1", f"run.dir={tmp_path}/run", "eval.interval=0"]
    refusal, written = (CliRunner().invoke(app, [*command, *option]) for option in ([], ["--data-later"]))
    assert refusal.exit_code == 66, refusal.output
    assert written.exit_code == 0, written.output
    assert f"data.train={tmp_path}/later" in written.stdout


def test_the_folder_of_the_run_is_looked_into(tmp_path: Path) -> None:
    run_dir = tmp_path / "llama-run"
    run_dir.mkdir()
    tiny(tmp_path)
    (run_dir / "thesis.txt").touch()
    with refused(ConfigError, "run.dir", run_dir):
        tiny(tmp_path)
    with refused(ConfigError, "run.dir", run_dir) as error:
        tiny(tmp_path, "data.epochs=1", time="never")
    for field in ("--time", "source train"):
        check_problem(error.value.problems, field)
    job_script("tiny", data(tmp_path), SlurmJob(2, 1), data_later=True)


def test_settings_that_do_not_fit_are_told_before_the_data_is_read(tmp_path: Path) -> None:
    train = tmp_path / "train"
    mixed = f"data.sources={{a: {{train: {train}, epochs: 1}}, b: {{train: {train}, weight: 1}}}}"
    with refused(ConfigError, "data.sources", "a: epochs, b: weight", remedy=False):
        tiny(tmp_path, mixed, "data.train=null", "data.valid=null", "data.epochs=1", "eval.interval=0")


def command(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(
        app, ["slurm", "--config", "tiny", "--nodes", "2", "--gpus-per-node", "1", *arguments]
    )
    return result.exit_code, result.output


def test_the_command_prints_or_writes_it(tmp_path: Path) -> None:
    path, settings = tmp_path / "new folder" / "job.sh", data(tmp_path)
    code, printed = command(*settings)
    assert (code, printed) == (0, tiny(tmp_path))
    assert command(*settings, "--output", str(path)) == (0, "")
    assert path.read_text() == printed
    assert stat.S_IMODE(path.stat().st_mode) == 0o755
    path.write_text("mine")
    code, said = command(*settings, "--output", str(path))
    assert code == 73
    assert is_shown(said, "--output", path)
    assert path.read_text() == "mine"
    assert command(*settings, "--output", str(path), "--force") == (0, "")
    assert path.read_text() == printed


def test_a_refused_run_writes_nothing(tmp_path: Path) -> None:
    run = f"run.dir={tmp_path / 'run'}"
    assert (
        command("--output", str(tmp_path / "job.sh"), "data.train=nowhere", "eval.interval=0", run)[0] == 66
    )
    assert command("--output", str(tmp_path / "job.sh"), "--time", "never")[0] == 64
    assert list(tmp_path.iterdir()) == []


def test_a_script_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "job.sh"
    path.write_text("old")

    def fails(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fails)
    with pytest.raises(OutputError):
        write_script("new", path, force=True)
    assert [file.read_text() for file in tmp_path.iterdir()] == ["old"]
