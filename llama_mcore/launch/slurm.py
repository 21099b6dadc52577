"""`llama-mcore slurm`: a job script like those in slurm/, for any run, after all checks that need no GPU.

Two programs parse the script. Bash reads the command, where `bash_word` writes any text as one word. sbatch
reads the #SBATCH lines: between double quotes it takes everything literally except `"` and a backslash, which
a backslash escapes, and the end of the line, for which there is no escape (Slurm 22.05, tried).
"""

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from llama_mcore.config.checks import check_config
from llama_mcore.config.load import load_config
from llama_mcore.config.schema import RunConfig
from llama_mcore.errors import ConfigError, LlamaMcoreError, OutputError, Problem, gathering, raise_all
from llama_mcore.files import output_errors, published
from llama_mcore.train.ds_config import deepspeed_config
from llama_mcore.units import format_count

# A name begins the name of the job's output file, and 255 bytes are the most for that.
LONGEST_NAME = 200
# Slurm's own limit of --signal.
LONGEST_WARNING_S = 65_535
# man sbatch, --time: "minutes", "minutes:seconds", "hours:minutes:seconds", "days-hours",
# "days-hours:minutes" and "days-hours:minutes:seconds".
TIME = r"\d+(:\d+){0,2}|\d+-\d+(:\d+){0,2}|UNLIMITED|INFINITE"
SITE_NAME = r"[\w.+@:,/-]+"
EXECUTABLE = 0o755


@dataclass(frozen=True)
class SlurmJob:
    """Options of sbatch. A field that is None is left to the site."""

    nodes: int
    gpus_per_node: int = 8
    time: str = "24:00:00"
    signal_seconds: int = 180
    """Seconds before the time limit at which the run is told to save."""
    job_name: str | None = None
    """Default: the name of the run's folder."""
    partition: str | None = None
    account: str | None = None
    qos: str | None = None


def job_script(config: str, overrides: Sequence[str], job: SlurmJob, *, data_later: bool = False) -> str:
    """Script that runs `llama-mcore train --config CONFIG OVERRIDES` on the nodes of `job`.

    Raises one error with all problems: of their kind if all share one, else ConfigError. With `data_later` no
    files are checked, since the data need not exist yet; the job itself checks them.
    """
    failures: list[LlamaMcoreError] = []
    problems = [*_check_job(job), *_check_words(config, overrides)]
    with gathering(failures):
        run = load_config(config, overrides)
    if failures:
        raise_all([ConfigError(problems), *failures] if problems else failures)
    job = replace(job, job_name=job.job_name or Path(run.run.dir).name)
    of_run = _check_run(run, job)
    problems += [*_check_name(job.job_name or ""), *of_run]
    if problems:
        failures.append(ConfigError(problems))
    if not data_later:
        # loads numpy, which a plan does without
        from llama_mcore.diagnose.checks_run import planned_data, unusable_files

        failures += unusable_files(run, None if of_run else lambda: planned_data(run))
    raise_all(failures)
    return _render(config, overrides, run, job)


def write_script(text: str, path: Path, *, force: bool) -> None:
    """Write an executable file, whole or not at all. Raises OutputError, without `force` also if it
    exists."""
    if path.exists() and not force:
        raise OutputError(Problem("--output", path, "already exists", "give another name, or --force"))
    with published(path) as temporary, output_errors(path):
        temporary.write_text(text, encoding="utf-8")
        temporary.chmod(EXECUTABLE)


def bash_word(text: str) -> str:
    """`text` as one word of bash, without invisible characters, that shellcheck accepts."""
    plain = all(c.isalnum() or (c.isascii() and c.isprintable() and c not in "$`'\\") for c in text)
    if plain:
        return shlex.quote(text)
    return f"$'{''.join(_escaped(c) for c in text)}'"


def sbatch_value(text: str) -> str:
    """`text`, which is a single line, as the value of an option in a #SBATCH line."""
    if re.fullmatch(r"[\w.:,@%+/-]+", text, re.ASCII):
        return text
    return '"' + re.sub(r'(["\\])', r"\\\1", text) + '"'


def _escaped(character: str) -> str:
    if character in "'\\":
        return "\\" + character
    if character.isascii() and character.isprintable():
        return character
    return "".join(f"\\x{byte:02x}" for byte in character.encode())


def _render(config: str, overrides: Sequence[str], run: RunConfig, job: SlurmJob) -> str:
    options = {
        "job-name": job.job_name,
        "nodes": job.nodes,
        "ntasks-per-node": 1,
        "gpus-per-node": job.gpus_per_node,
        "exclusive": "",
        "mem": 0,
        "time": job.time,
        "partition": job.partition,
        "account": job.account,
        "qos": job.qos,
        "signal": f"B:USR1@{job.signal_seconds}",
        "requeue": "",
        "open-mode": "append",
        "output": "%x-%j.out",
    }
    lines = [
        f"#SBATCH --{name}" + (f"={sbatch_value(str(value))}" if value != "" else "")
        for name, value in options.items()
        if value is not None
    ]
    ranks = job.nodes * job.gpus_per_node
    command = " ".join(bash_word(word) for word in ("train", "--config", _findable(config), *overrides))
    return "\n".join(
        [
            "#!/usr/bin/env bash",
            *lines,
            f"# {format_count(run.model.num_params())} parameters on {ranks:,} ranks: tensor parallel "
            f"{run.parallel.tp} x data parallel {run.parallel.dp(ranks):,},",
            f"# ZeRO-{run.zero.stage}; {format_count(run.tokens_per_step * run.train.steps)} tokens. "
            "Written by llama-mcore slurm.",
            "#",
            "# Submit from the checkout, after entering your site's settings in slurm/env.sh: sbatch THIS_SCRIPT",
            "# sbatch options go before the script, settings of the run after it.",
            "set -euo pipefail",
            'cd "${SLURM_SUBMIT_DIR:-.}"',
            "[[ -e slurm/env.sh ]] || "
            '{ echo "slurm: $PWD has no slurm/env.sh: submit from the checkout" >&2; exit 66; }',
            "source slurm/run.sh",
            "",
            f'{command} "$@"',
            "",
        ]
    )


def _findable(config: str) -> str:
    """Absolute path of a file, since the job may start elsewhere; other names are those of shipped
    configs."""
    return str(Path(config).absolute()) if Path(config).is_file() else config


def _check_run(run: RunConfig, job: SlurmJob) -> list[Problem]:
    """Problems that `train` would report on so many ranks."""
    ranks = job.nodes * job.gpus_per_node
    if ranks < 1:
        return []  # a problem of --nodes or --gpus-per-node
    try:
        check_config(run, ranks)
        deepspeed_config(run.zero, run.train, run.optim, run.parallel.dp(ranks))
    except LlamaMcoreError as error:
        return error.problems
    return []


def _check_job(job: SlurmJob) -> list[Problem]:
    problems = [
        Problem(option, value, "must be at least 1")
        for option, value in (("--nodes", job.nodes), ("--gpus-per-node", job.gpus_per_node))
        if value < 1
    ]
    if not 1 <= job.signal_seconds <= LONGEST_WARNING_S:
        reason = f"must be from 1 to {LONGEST_WARNING_S:,} seconds before the time limit"
        problems.append(Problem("--signal-seconds", job.signal_seconds, reason))
    if not re.fullmatch(TIME, job.time, re.ASCII):
        remedy = "e.g. 90 (minutes), 12:00:00 or 2-12:00:00 (days-hours:minutes:seconds)"
        problems.append(Problem("--time", job.time, "is not a time limit that Slurm accepts", remedy))
    elif (limit := _seconds(job.time)) and job.signal_seconds >= limit:
        reason = (
            f"must be below the {limit:,} s of --time {job.time}, or the job is asked to stop as it starts"
        )
        problems.append(Problem("--signal-seconds", job.signal_seconds, reason))
    for option, name in (("--partition", job.partition), ("--account", job.account), ("--qos", job.qos)):
        if name is not None and not re.fullmatch(SITE_NAME, name, re.ASCII):
            reason = "must consist of letters, digits and _ . + @ : , / -"
            problems.append(
                Problem(option, name, reason, "look up its name in the site's Slurm (sinfo, sacctmgr)")
            )
    return problems


def _seconds(limit: str) -> int:
    """Seconds of a time limit in one of the forms of TIME; 0 for none, as in Slurm."""
    if not limit[0].isdigit():
        return 0
    days, dash, clock = limit.rpartition("-")
    numbers = [int(number) for number in clock.split(":")]
    # After days, hours come first; else minutes, unless there are three numbers.
    first = 3600 if dash or len(numbers) == 3 else 60
    return int(days or 0) * 86_400 + sum(n * first // 60**i for i, n in enumerate(numbers))


def _check_name(name: str) -> list[Problem]:
    remedy = "give --job-name; it defaults to the name of the run's folder"
    if not name or not name.isprintable() or "/" in name:
        reason = "must consist of printable characters other than /: the output file's name begins with it"
        return [Problem("--job-name", name, reason, remedy)]
    if len(name.encode()) > LONGEST_NAME:
        reason = f"must not exceed {LONGEST_NAME} bytes: the output file's name begins with it"
        return [Problem("--job-name", name, reason, remedy)]
    return []


def _check_words(config: str, overrides: Sequence[str]) -> list[Problem]:
    """Problems of words that are not UTF-8: Python turns such bytes into halves of surrogate pairs."""
    return [
        Problem(field, ascii(word), "must be UTF-8", "rename the file, or fix the text")
        for field, word in (("--config", config), *(("override", word) for word in overrides))
        if any("\ud800" <= character <= "\udfff" for character in word)
    ]
