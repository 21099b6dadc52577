"""slurm/*.sh up to the border of Slurm: what they give srun, and what they do with signals and exit codes.

`srun` and `scontrol` are programs that write down how they were called; bash and the scripts are real.
"""

import json
import os
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from llama_mcore.config.checks import check_config
from llama_mcore.config.load import load_config
from llama_mcore.launch.slurm import SlurmJob, job_script, write_script
from llama_mcore.preprocess import preprocess
from llama_mcore.tokenizer.train import train_tokenizer
from tests.support.errors import is_shown
from tests.support.models import write_tokens
from tests.support.text import write_jsonl
from tests.support.world import ROOT, TIMEOUT_S, wait_until

pytestmark = pytest.mark.process
SCRIPTS = sorted(path.name for path in (ROOT / "slurm").glob("*b.sh"))
RECORD = """
import json, os, sys
from pathlib import Path
open(os.environ["CALLS"], "a").write(json.dumps([Path(sys.argv[0]).stem, *sys.argv[1:]]) + "\\n")
"""
# One that is named in HELD leaves a file when it begins, and goes on when it finds another.
HELD = """
import os, sys, time
from pathlib import Path
if os.environ.get("HELD") == Path(sys.argv[0]).stem:
    Path(os.environ["CALLS"] + ".held").touch()
    while not Path(os.environ["CALLS"] + ".released").exists():
        time.sleep(0.01)
"""
PROGRAMS = {
    "srun": f"""
import os, signal, time
{RECORD}
got = []
def note(number, frame):
    got.append(number)
    Path(os.environ["CALLS"] + f".got-{{len(got)}}").touch()
for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, note)
Path(os.environ["CALLS"] + ".started").touch()
if os.environ.get("WAITS_FOR"):
    while len(got) < int(os.environ["WAITS_FOR"]):
        time.sleep(0.01)
    time.sleep(0.2)  # it saves
    open(os.environ["CALLS"], "a").write(json.dumps(["got", signal.Signals(got[0]).name]) + "\\n")
sys.exit(int(os.environ["EXIT"]))
""",
    "scontrol": f"""
{HELD}
{RECORD}
if sys.argv[1:] == ["show", "job", "123456"]:
    print("JobId=123456 JobName=x\\n   JobState=" + os.environ.get("STATE", "RUNNING Reason=None") + " x")
    print("   RunTime=00:01:00 TimeLimit=2-12:00:00 TimeMin=N/A")
    print("   Command=" + os.environ.get("COMMAND", "") + "\\n   WorkDir=/w")
elif os.environ.get("NO_REQUEUE"):
    sys.exit("Requested operation is presently disabled")
""",
    "sbatch": f"{RECORD}\nsys.exit(os.environ.get('NO_SBATCH'))",
    "hostname": f"{HELD}\nprint('node7')",
}


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., "subprocess.Popen[str]"]:
    """Starts a script as Slurm would on the first node of job 123456."""
    bin_dir = tmp_path / "bin"
    bin_dir.mkdir()
    for name, program in PROGRAMS.items():
        (bin_dir / f"{name}.py").write_text(program)
        path = bin_dir / name
        # the first line of a program cannot hold the spaces that a checkout's path may have
        words = shlex.join([sys.executable, str(bin_dir / f"{name}.py")])
        path.write_text(f'#!/bin/sh\nexec {words} "$@"\n')
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    # as Slurm does: a script runs from a copy elsewhere
    copied = tmp_path / "spool"
    copied.mkdir()

    def run(script: str, *arguments: str, code: int = 0, **others: str) -> "subprocess.Popen[str]":
        shutil.copy(ROOT / "slurm" / script, copied / "slurm_script")
        environment = {
            "PATH": f"{bin_dir}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "CALLS": str(tmp_path / "calls"),
            "EXIT": str(code),
            "SLURM_JOB_ID": "123456",
            "SLURM_JOB_NUM_NODES": "3",
            "SLURM_SUBMIT_DIR": str(ROOT),
            "SLURM_GPUS_PER_NODE": "a100:8",
            **others,
        }
        words = ["bash", str(copied / "slurm_script"), *arguments]
        return subprocess.Popen(words, cwd=tmp_path, env=environment, text=True, stderr=subprocess.PIPE)

    return run


def calls(folder: Path) -> list[list[str]]:
    return [json.loads(line) for line in (folder / "calls").read_text().splitlines()]


def srun_call(folder: Path) -> list[str]:
    (found,) = [call for call in calls(folder) if call[0] == "srun"]
    return found[1:]


def after(words: Sequence[str], flag: str) -> str:
    return next(word.partition("=")[2] for word in words if word.startswith(f"{flag}="))


@pytest.mark.parametrize("script", SCRIPTS)
def test_all_nodes_meet_at_the_first(script: str, start: Callable, tmp_path: Path) -> None:
    assert start(script).wait(TIMEOUT_S) == 0
    words = srun_call(tmp_path)
    assert {"--kill-on-bad-exit=0", "--wait=20"} <= {*words}
    assert words[words.index("llama-mcore") + 1] == "torchrun"
    assert (after(words, "--nnodes"), after(words, "--nproc-per-node")) == ("3", "8")
    assert (after(words, "--master-addr"), after(words, "--master-port")) == ("node7", "23456")
    assert after(words, "--rdzv-id") == "123456"
    assert words[-3:] == ["tools/train.py", "--config", script.removesuffix(".sh")]


def test_a_rendered_script_gives_srun_what_it_was_given(start: Callable, tmp_path: Path) -> None:
    odd = ["run.dir=a b/$(touch x);*", "observe.tensorboard=false", "train.global_batch_size=96"]
    write_tokens(tmp_path / "train", [np.arange(1000)])
    train = [f"data.train={tmp_path / 'train'}", "data.epochs=9999"]
    settings = [*odd, *train, "eval.interval=0", "data.tokenizer="]
    script = tmp_path / "rendered job.sh"
    write_script(job_script("tiny", settings, SlurmJob(3, 8, job_name="x")), script, force=False)
    assert start(str(script), "train.steps=20", "two\nlines").wait(TIMEOUT_S) == 0
    words = srun_call(tmp_path)
    wanted = ["--config", "tiny", *settings, "train.steps=20", "two\nlines"]
    assert words[words.index("tools/train.py") + 1 :] == wanted
    assert (after(words, "--nnodes"), after(words, "--nproc-per-node")) == ("3", "8")


def test_arguments_arrive_as_they_are(start: Callable, tmp_path: Path) -> None:
    odd = ["--config", "tiny", "train.steps=20", "run.dir=a b/$(touch x);*", "-x", "two\nlines", ""]
    assert start("65b.sh", *odd).wait(TIMEOUT_S) == 0
    words = srun_call(tmp_path)
    assert words[words.index("tools/train.py") + 3 :] == odd
    assert not (ROOT / "x").exists()


@pytest.mark.parametrize(("code", "requeues"), [(0, False), (1, False), (64, False), (75, True), (93, False)])
def test_exit_codes_go_on_and_75_into_the_queue(
    code: int, requeues: bool, start: Callable, tmp_path: Path
) -> None:
    assert start("7b.sh", code=code).wait(TIMEOUT_S) == code
    asked = [call[1:] for call in calls(tmp_path) if call[0] == "scontrol"]
    assert (["requeue", "123456"] in asked) == requeues


def test_a_site_chooses_after_which_exit_codes_it_goes_on(start: Callable, tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    shutil.copytree(ROOT / "slurm", checkout / "slurm")
    with (checkout / "slurm" / "env.sh").open("a") as settings:
        settings.write('REQUEUE_ON="75 137 1 93"\n')
    for code, requeues in (
        (75, True),
        (137, True),
        (1, True),
        (37, False),
        (7, False),
        (93, False),  # never, whatever the site says
        (0, False),
    ):
        (tmp_path / "calls").unlink(missing_ok=True)
        assert start("7b.sh", code=code, SLURM_SUBMIT_DIR=str(checkout)).wait(TIMEOUT_S) == code
        assert (["scontrol", "requeue", "123456"] in calls(tmp_path)) == requeues, code


@pytest.mark.parametrize(
    ("state", "requeues"),
    [
        ("RUNNING Reason=None", True),
        ("COMPLETING Reason=TimeLimit", True),
        ("COMPLETING Reason=None", False),  # cancelled, or Slurm requeues it without being asked
    ],
)
def test_only_a_job_that_nobody_cancelled_is_requeued(
    state: str, requeues: bool, start: Callable, tmp_path: Path
) -> None:
    assert start("7b.sh", code=75, STATE=state).wait(TIMEOUT_S) == 75
    assert (["scontrol", "requeue", "123456"] in calls(tmp_path)) == requeues


@pytest.mark.parametrize("arguments", [[], ["--config", "tiny", "run.dir=a b/$(x)'"]])
def test_a_job_that_cannot_be_requeued_says_how_to_submit_it(
    arguments: list[str], start: Callable, tmp_path: Path
) -> None:
    command = " ".join(["/w x/slurm/65b.sh", *arguments])  # as scontrol shows it
    asked = {"SLURM_JOB_PARTITION": "gpu", "SLURM_JOB_ACCOUNT": "a b"}
    job = start("65b.sh", *arguments, code=75, NO_REQUEUE="1", COMMAND=command, **asked)
    _, said = job.communicate(timeout=TIMEOUT_S)
    assert job.returncode == 75
    assert "Requested operation is presently disabled" in said
    assert "job 123456 ended with exit code 75 and could NOT be put back into the queue" in said
    # bash itself reads the command back
    line = said.splitlines()[-1].replace("&& sbatch", "&& printf '%s\\0'")
    words = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True).stdout
    options = ["--nodes=3", "--gpus-per-node=a100:8", "--time=2-12:00:00", "--partition=gpu", "--account=a b"]
    assert words.split("\0")[:-1] == [*options, "/w x/slurm/65b.sh", *arguments]


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_signals_go_on_to_the_step_which_is_waited_for(
    number: signal.Signals, start: Callable, tmp_path: Path
) -> None:
    script = start("7b.sh", code=75, WAITS_FOR="1")
    wait_for(tmp_path / "calls.started", script)
    script.send_signal(number)
    assert script.wait(TIMEOUT_S) == 75
    order = [call if call[0] == "got" else call[0] for call in calls(tmp_path)]
    # TERM too arrives as USR1: srun itself takes TERM for the wish to kill the step
    assert order == ["srun", ["got", "SIGUSR1"], "scontrol", "scontrol"]


def wait_for(path: Path, script: "subprocess.Popen[str]") -> None:
    wait_until(path.exists, lambda: script.poll() is None)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_request_before_the_step_begins_puts_the_job_back(
    number: signal.Signals, start: Callable, tmp_path: Path
) -> None:
    script = start("7b.sh", HELD="hostname")
    wait_for(tmp_path / "calls.held", script)
    script.send_signal(number)
    (tmp_path / "calls.released").touch()
    assert script.wait(TIMEOUT_S) == 75
    assert [call[:2] for call in calls(tmp_path)] == [["scontrol", "show"], ["scontrol", "requeue"]]


def test_a_request_that_ends_srun_itself_puts_the_job_back(start: Callable, tmp_path: Path) -> None:
    script = start("7b.sh", WAITS_FOR="1", code=138)
    wait_for(tmp_path / "calls.started", script)
    script.send_signal(signal.SIGUSR1)
    assert script.wait(TIMEOUT_S) == 75
    assert ["scontrol", "requeue", "123456"] in calls(tmp_path)


def test_138_after_a_second_request_stays(start: Callable, tmp_path: Path) -> None:
    script = start("7b.sh", WAITS_FOR="2", code=138)
    wait_for(tmp_path / "calls.started", script)
    for number in (1, 2):
        script.send_signal(signal.SIGUSR1)
        wait_for(tmp_path / f"calls.got-{number}", script)
    assert script.wait(TIMEOUT_S) == 138
    assert ["scontrol", "requeue", "123456"] not in calls(tmp_path)


def test_a_request_after_the_step_has_ended_changes_nothing(start: Callable, tmp_path: Path) -> None:
    script = start("7b.sh", code=75, HELD="scontrol")
    wait_for(tmp_path / "calls.held", script)
    script.send_signal(signal.SIGTERM)
    (tmp_path / "calls.released").touch()
    assert script.wait(TIMEOUT_S) == 75
    assert ["scontrol", "requeue", "123456"] in calls(tmp_path)


ALL_SCRIPTS = [*SCRIPTS, "preprocess.sh", "merge.sh", "convert.sh"]


@pytest.mark.parametrize("script", ALL_SCRIPTS)
def test_a_script_that_was_submitted_from_elsewhere_says_so(
    script: str, start: Callable, tmp_path: Path
) -> None:
    job = start(script, SLURM_SUBMIT_DIR=str(tmp_path))
    _, said = job.communicate(timeout=TIMEOUT_S)
    assert job.returncode == 66
    (line,) = said.splitlines()
    assert f"{tmp_path} has no slurm/env.sh" in line


@pytest.mark.parametrize("script", ["7b.sh", "convert.sh"])
def test_what_a_site_sources_may_use_variables_that_are_not_set(
    script: str, start: Callable, tmp_path: Path
) -> None:
    checkout = tmp_path / "checkout"
    shutil.copytree(ROOT / "slurm", checkout / "slurm")
    settings = checkout / "slurm" / "env.sh"
    first, rest = settings.read_text().split("# Modules and", 1)
    settings.write_text(f'{first}export SEEN="of$_NOT_SET_ANYWHERE"\n# Modules and{rest}')
    job = start(script, "--help", SLURM_SUBMIT_DIR=str(checkout))
    _, said = job.communicate(timeout=TIMEOUT_S)
    assert (job.returncode, said) == (0, "")


def test_a_site_names_the_first_node(start: Callable, tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    shutil.copytree(ROOT / "slurm", checkout / "slurm")
    with (checkout / "slurm" / "env.sh").open("a") as settings:
        settings.write("MASTER_ADDR=node7-ib\nMASTER_PORT=29500\n")
    # what the shell that submitted happens to have is not the site's wish
    of_shell = {"MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    assert start("7b.sh", SLURM_SUBMIT_DIR=str(checkout), **of_shell).wait(TIMEOUT_S) == 0
    words = srun_call(tmp_path)
    assert (after(words, "--master-addr"), after(words, "--master-port")) == ("node7-ib", "29500")
    (tmp_path / "calls").unlink()
    assert start("7b.sh", **of_shell).wait(TIMEOUT_S) == 0
    assert after(srun_call(tmp_path), "--master-addr") == "node7"


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_nodes_that_it_asks_for_suit_its_run(script: str) -> None:
    text = (ROOT / "slurm" / script).read_text()
    nodes, gpus = (int(re.search(rf"#SBATCH --{name}=(\d+)", text)[1]) for name in ("nodes", "gpus-per-node"))
    run = load_config(script.removesuffix(".sh"))
    check_config(run, nodes * gpus)
    assert gpus % run.parallel.tp == 0
    assert f"{nodes * gpus:,} A100" in text
    assert "#SBATCH --signal=B:USR1@180" in text
    assert "#SBATCH --requeue" in text


def test_an_array_and_its_merge_write_what_one_job_does(start: Callable, tmp_path: Path) -> None:
    """All real but Slurm: two tasks, each with its shard, and the job that the first one asks for."""
    tokenizer, data = tmp_path / "tokenizer.model", tmp_path / "a folder"
    data.mkdir()
    documents = [{"text": f"document {number}: " + "some words " * (number % 7 + 1)} for number in range(300)]
    corpus = write_jsonl(tmp_path / "corpus.jsonl", documents)
    train_tokenizer([corpus], tokenizer, vocab_size=300)
    options = [
        "--input",
        str(corpus),
        "--tokenizer-model",
        str(tokenizer),
        "--append-eod",
        "--validation-split",
        "0.2",
    ]
    array = {"SLURM_ARRAY_JOB_ID": "77", "SLURM_ARRAY_TASK_MAX": "1", "SLURM_ARRAY_TASK_COUNT": "2"}
    words = ("preprocess.sh", str(data / "many"), *options)
    job = start(*words, SLURM_ARRAY_TASK_ID="0", **array)
    assert job.wait(TIMEOUT_S) == 0, job.stderr.read()
    (asked,) = [call[1:] for call in calls(tmp_path)]
    assert asked == [
        *("--dependency=afterok:77", "--kill-on-invalid-dep=yes", "slurm/merge.sh", str(data / "many"))
    ]
    again = start(*words, SLURM_ARRAY_TASK_ID="0", SLURM_RESTART_COUNT="1", **array)
    assert again.wait(TIMEOUT_S) == 0, again.stderr.read()
    assert len(calls(tmp_path)) == 1
    early = start("merge.sh", str(data / "many"))
    assert early.wait(TIMEOUT_S) == 66
    assert "1 of 2 shards in" in early.stderr.read()
    # the other one is run again by itself
    alone = {"SLURM_ARRAY_JOB_ID": "78", "SLURM_ARRAY_TASK_MAX": "1", "SLURM_ARRAY_TASK_COUNT": "1"}
    refused = start(*words, SLURM_ARRAY_TASK_ID="1", **alone)
    assert refused.wait(TIMEOUT_S) == 64
    assert "add --export=ALL,SHARDS=32" in refused.stderr.read()
    job = start(*words, SLURM_ARRAY_TASK_ID="1", SHARDS="2", **alone)
    assert job.wait(TIMEOUT_S) == 0, job.stderr.read()
    assert start("merge.sh", str(data / "many")).wait(TIMEOUT_S) == 0
    preprocess(
        [corpus],
        tokenizer,
        data / "one",
        json_keys=["text"],
        workers=1,
        append_eod=True,
        validation_split=0.2,
    )
    for name in ("text_document.bin", "text_document.idx", "text_validation.bin", "text_validation.idx"):
        assert (data / f"many_{name}").read_bytes() == (data / f"one_{name}").read_bytes(), name


@pytest.mark.parametrize(
    ("script", "arguments", "code", "said"),
    [
        ("merge.sh", [], 64, "usage"),
        ("preprocess.sh", [], 64, "usage"),
        ("preprocess.sh", ["out", "--input", "x"], 64, "usage: sbatch"),
        ("merge.sh", ["no such prefix"], 66, "no shard of no such prefix.shards is done"),
    ],
)
def test_scripts_of_data_say_what_is_missing(
    script: str, arguments: list[str], code: int, said: str, start: Callable
) -> None:
    job = start(script, *arguments)
    assert job.wait(TIMEOUT_S) == code
    assert said in job.stderr.read()


def test_shards_of_two_arrays_are_not_joined(start: Callable, tmp_path: Path) -> None:
    shards = tmp_path / "out.shards"
    shards.mkdir()
    for name in ("done_0_of_2", "done_1_of_2", "done_3_of_8"):
        (shards / name).touch()
    job = start("merge.sh", str(tmp_path / "out"))
    assert job.wait(TIMEOUT_S) == 65
    assert str(shards) in job.stderr.read()


def test_where_nodes_may_not_submit_the_array_says_what_is_left_to_do(
    start: Callable, tmp_path: Path
) -> None:
    array = {"SLURM_ARRAY_JOB_ID": "77", "SLURM_ARRAY_TASK_MAX": "1", "SLURM_ARRAY_TASK_COUNT": "2"}
    missing = ("--input", "no such file", "--tokenizer-model", "no such file")
    job = start(
        "preprocess.sh", str(tmp_path / "out"), *missing, SLURM_ARRAY_TASK_ID="0", NO_SBATCH="no", **array
    )
    _, said = job.communicate(timeout=TIMEOUT_S)
    assert f"Once all tasks are done: sbatch slurm/merge.sh {tmp_path}/out\n" in said
    assert job.returncode == 66  # of what comes next


def test_convert_passes_its_options_on(start: Callable, tmp_path: Path) -> None:
    job = start(
        "convert.sh", "--input", str(tmp_path / "no such"), "--to", "hf", "--output", str(tmp_path / "out")
    )
    assert job.wait(TIMEOUT_S) == 66
    assert is_shown(job.stderr.read(), "--input", tmp_path / "no such", remedy=False)
