"""What can be found out before a run wherever its files are seen: its data, and what a start would do in its
folder. Loads no torch."""

import os
from collections.abc import Callable
from pathlib import Path

from llama_mcore.checkpoint.lease import check_free
from llama_mcore.checkpoint.start import Outlook, Start, outlook
from llama_mcore.config import RunConfig
from llama_mcore.data.ledger import Segment, check_caps
from llama_mcore.data.sources import OpenSource, missing_inputs, open_sources, plan_run
from llama_mcore.errors import MissingInputError, Problem, UserError, gathering
from llama_mcore.launch.finding import Finding
from llama_mcore.launch.progress import check_progress
from llama_mcore.units import format_count


def planned_data(run: RunConfig) -> tuple[list[OpenSource], Segment]:
    """Every dataset, opened, and the plan of what the run reads. Raises DataError where that is more than
    planned, MissingInputError and DataError for data that cannot be used."""
    sources = open_sources(run.data, run.model.seq_length, run.model.vocab_size)
    plan = plan_run(run.data, sources, run.run.seed, run.model.seq_length)
    check_caps(plan, run.train.steps * run.train.global_batch_size)
    return sources, plan


def unusable_files(
    run: RunConfig,
    look_at_data: Callable[[], object] | None,
    asked: Start = Start(),  # noqa: B008  frozen
    say: Callable[[str], object] = lambda remark: None,
) -> list[UserError]:
    """What is wrong with the files that the run reads, and with those in its folder. Who holds it now is not
    asked.

    `look_at_data`, called where all files are there, raises what `planned_data` does; None for settings with
    which nobody can look. `say` is told what a start would do in the folder, and what it would remark there.
    """
    failures: list[UserError] = []
    with gathering(failures):
        if missing := missing_inputs(run.data):
            raise MissingInputError(missing)
        if look_at_data:
            look_at_data()
    with gathering(failures):
        found = outlook(run, asked)
        for remark in (f"start: {found}", *found.way.remarks()):
            say(remark)
    return failures


def data(run: RunConfig) -> tuple[list[Finding], list[OpenSource]]:
    """Every dataset can be opened here and holds what the run is going to read; else no source is given."""
    try:
        sources, _ = planned_data(run)
    except UserError as error:
        return [_problem("data", problem) for problem in error.problems], []
    tokens = format_count(run.tokens_per_step * run.train.steps)
    return [
        Finding("data", "tokens", "ok", f"{tokens} are to be read, and are there", required=True)
    ], sources


def start(
    run: RunConfig,
    asked: Start = Start(),  # noqa: B008  frozen
    *,
    retry: bool = False,
) -> list[Finding]:
    """What a start would do in the run's folder, or why it would be refused there.

    `retry`: it starts although the last lives saved nothing.
    """
    run_dir, job = Path(run.run.dir), os.environ.get("SLURM_JOB_ID", "")
    found = _refusals(lambda: check_free(run_dir))
    if not retry:
        found += _refusals(lambda: check_progress(run_dir, job))
    try:
        return [*found, _ahead(outlook(run, asked))]
    except UserError as error:
        return [*found, *(_problem("run folder", problem) for problem in error.problems)]


def _refusals(check: Callable[[], None]) -> list[Finding]:
    try:
        check()
    except UserError as error:
        return [_problem("run folder", problem) for problem in error.problems]
    return []


def _ahead(found: Outlook) -> Finding:
    remarks = found.way.remarks()
    if found.passed_over:
        remarks.insert(0, f"what is newer is damaged and passed over: {found.passed_over[0]}")
    return Finding(
        "run folder",
        "start",
        "note" if remarks else "ok",
        str(found),
        "; ".join(remarks),
        required=True,
    )


def _problem(group: str, problem: Problem) -> Finding:
    value = str(problem.value)
    return Finding(group, problem.field, "problem", value, problem.bound, problem.remedy, required=True)
