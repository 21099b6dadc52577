"""Checks before a run that need its files alone: its data, the effect of a start in its folder, and space for
its checkpoints. Loads no torch and changes nothing."""

import errno
import math
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from llama_mcore.checkpoint.paths import checkpoints_dir, room_for, step_folders
from llama_mcore.checkpoint.run_lock import check_free
from llama_mcore.checkpoint.start import Outlook, Start, outlook
from llama_mcore.config.schema import RunConfig
from llama_mcore.data.data_plan import Segment, check_caps
from llama_mcore.data.sources import OpenSource, missing_inputs, open_sources, plan_run
from llama_mcore.diagnose.finding import Finding, problem_of
from llama_mcore.errors import LlamaMcoreError, MissingInputError, OutputError, Problem, gathering
from llama_mcore.observe.goodput.attempts import check_progress
from llama_mcore.units import format_bytes, format_count


def planned_data(run: RunConfig) -> tuple[list[OpenSource], Segment]:
    """All datasets, opened, and the plan of what the run reads. Raises MissingInputError and DataError for
    data that cannot be used, DataError also where the run would read more than it may."""
    sources = open_sources(run.data, run.model.seq_length, run.model.vocab_size)
    plan = plan_run(run.data, sources, run.run.seed, run.model.seq_length)
    check_caps(plan, run.train.steps * run.train.global_batch_size)
    return sources, plan


def unusable_files(
    run: RunConfig,
    check_data: Callable[[], object] | None,
    request: Start = Start(),  # noqa: B008  frozen
    say: Callable[[str], object] = lambda remark: None,
) -> list[LlamaMcoreError]:
    """Errors of the files that the run reads, of its folder as a place to write to, and of what that
    contains; not of another job that holds it.

    `check_data`, called where no file is missing, raises what `planned_data` does; None where the settings do
    not allow to open the data. `say` gets the effect of a start in the folder, and its remarks.
    """
    failures: list[LlamaMcoreError] = []
    with gathering(failures):
        if missing := missing_inputs(run.data):
            raise MissingInputError(missing)
        if check_data:
            check_data()
    with gathering(failures):
        _check_writable(Path(run.run.dir))
        found = outlook(run, request)
        for remark in (f"start: {found}", *found.plan.remarks()):
            say(remark)
    with gathering(failures):
        space = free_space(run, fresh=request.fresh)
        if space.stops_training:
            raise OutputError(problem_of(space))
    return failures


def data(run: RunConfig) -> tuple[list[Finding], list[OpenSource]]:
    """Findings on the datasets, and the datasets if all can be opened and hold what the run will read."""
    try:
        sources, _ = planned_data(run)
    except LlamaMcoreError as error:
        return [_problem("data", problem) for problem in error.problems], []
    tokens = format_count(run.tokens_per_step * run.train.steps)
    return [
        Finding("data", "tokens", "ok", f"{tokens} will be read, and are available", required=True)
    ], sources


def free_space(run: RunConfig, *, fresh: bool = False) -> Finding:
    """Finding on the space for the checkpoints that the run will keep, besides those it has: the oldest is
    deleted once a newer one is complete. `fresh`: those it has are moved aside, and stay."""
    folder = checkpoints_dir(Path(run.run.dir))
    saves = math.ceil(run.train.steps / run.checkpoint.interval)
    held = 0
    with suppress(OSError, ValueError):  # a start refuses what cannot be listed
        held = 0 if fresh else len(step_folders(folder.parent))
    missing = max(1, min(run.checkpoint.keep + 1, saves) - held)
    free = shutil.disk_usage(_nearest(folder, os.path.isdir)).free
    needed = room_for(missing, run.model.num_params())
    value = f"{format_bytes(free)} are free"
    need = f"{missing} more checkpoint{'s need' if missing > 1 else ' needs'} {format_bytes(needed)}"
    if free < needed:
        remedy = "free space, choose another run.dir, or lower checkpoint.keep"
        return Finding("run folder", "free space", "problem", value, need, remedy, required=True)
    return Finding("run folder", "free space", "ok", f"{value}, {need}", required=True)


def _check_writable(run_dir: Path) -> None:
    """Raise OutputError where the run's folder, or the parent in which it would be made, cannot be written.
    Writes nothing."""
    for path in (run_dir, checkpoints_dir(run_dir)):
        folder = _nearest(path, os.path.lexists)  # and a link that leads nowhere is no folder
        try:
            reason = _why_not_writable(folder)
        except OSError as error:
            reason = error.strerror or str(error)
        if reason:
            problem = Problem(
                "run.dir", run_dir, f"{folder} cannot be written ({reason})", "choose another folder"
            )
            raise OutputError(problem)


def _nearest(path: Path, fits: Callable[[Path], bool]) -> Path:
    """The path itself, or its nearest parent, that fits."""
    return next(one for one in (path, *path.absolute().parents) if fits(one))


def _why_not_writable(folder: Path) -> str:
    if not folder.is_dir():
        return os.strerror(errno.ENOTDIR)
    if os.statvfs(folder).f_flag & os.ST_RDONLY:  # os.access tells root that it may write there
        return os.strerror(errno.EROFS)
    return "" if os.access(folder, os.W_OK | os.X_OK) else os.strerror(errno.EACCES)


def start(
    run: RunConfig,
    request: Start = Start(),  # noqa: B008  frozen
    *,
    retry: bool = False,
) -> list[Finding]:
    """Findings on a start in the run's folder: its effect, or why it would be refused.

    `retry`: start even though the last attempts saved nothing.
    """
    run_dir, job = Path(run.run.dir), os.environ.get("SLURM_JOB_ID", "")
    found = _refusals(lambda: check_free(run_dir))
    if not retry:
        found += _refusals(lambda: check_progress(run_dir, job))
    try:
        return [*found, _ahead(outlook(run, request))]
    except LlamaMcoreError as error:
        return [*found, *(_problem("run folder", problem) for problem in error.problems)]


def _refusals(check: Callable[[], None]) -> list[Finding]:
    try:
        check()
    except LlamaMcoreError as error:
        return [_problem("run folder", problem) for problem in error.problems]
    return []


def _ahead(found: Outlook) -> Finding:
    remarks = found.plan.remarks()
    if found.passed_over:
        remarks.insert(0, f"newer checkpoints are damaged and skipped: {found.passed_over[0]}")
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
    return Finding(group, problem.field, "problem", value, problem.reason, problem.remedy, required=True)
