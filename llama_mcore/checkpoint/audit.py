"""What `audit-data` does with the folder of a run: its newest checkpoint and its metrics against its plan."""

import sys
from collections.abc import Sequence
from pathlib import Path

import orjson
from rich.console import Console
from rich.progress import Progress

from llama_mcore.checkpoint.layout import find_checkpoint
from llama_mcore.checkpoint.manifest import read_manifest
from llama_mcore.data.audit import check_ledger, check_uses, count_uses, use_table
from llama_mcore.errors import DataError, MissingInputError, Problem, input_problem
from llama_mcore.observe.sinks import METRICS_FILE
from llama_mcore.train.state import Rollback


def audit_run(run_dir: Path) -> str:
    """Count from the plan how often every window was read up to the newest checkpoint, and compare every
    line of metrics.jsonl with it.

    Returns a table of plan against use and a conclusion. Raises DataError with what does not agree, after the
    same table.
    """
    path = find_checkpoint(run_dir)
    manifest = read_manifest(path)
    segments, position = manifest.segments, manifest.consumed_samples
    if not segments:
        bound = "was converted from another format and has read no data yet: there is nothing to audit"
        raise DataError(Problem("checkpoint", path, bound, "train from it first"))
    expected = segments[-1].used(position)
    with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("counting windows", total=sum(expected.values()))
        uses = count_uses(segments, position, lambda windows: progress.advance(task, windows))
    rows = _rows(run_dir / METRICS_FILE)
    rollbacks = manifest.health.rollbacks if manifest.health else ()
    problems = [
        *check_uses(uses),
        *check_ledger(segments, rows),
        *_check_jumps(rollbacks, rows, segments[-1].seq_length),
    ]
    if manifest.windows_read != expected:
        bound = f"the plan gives {expected}"
        problems.append(Problem(f"{path}: windows_read", manifest.windows_read, bound))
    table = use_table(segments, uses)
    if problems:
        problems[-1] = Problem(**vars(problems[-1]) | {"remedy": f"plan against use:\n{table}"})
        raise DataError(problems)
    changed = f" over {len(segments)} plans" if len(segments) > 1 else ""
    jumped = [
        f"Samples {past.first_sample:,} to {past.end_sample:,} were read and given up: after step "
        f"{past.at_step:,} the run rolled back to step {past.to_step:,} ({past.reason}).\n"
        for past in rollbacks
    ]
    return (
        f"{table}\n{''.join(jumped)}{position:,} samples and {len(rows):,} lines of {METRICS_FILE}{changed}: "
        "no window was read more often than planned, and the ledger says what the plan gives."
    )


def _check_jumps(rollbacks: Sequence[Rollback], rows: list[dict], seq_length: int) -> list[Problem]:
    """The first step after each rollback that is said to have read what it gave up."""
    problems = []
    for number, past in enumerate(rollbacks):
        if any(later.to_step < past.to_step for later in rollbacks[number:]):
            continue  # given up itself
        for row in rows:
            consumed = row["tokens"] // seq_length
            if row["step"] > past.to_step and consumed <= past.end_sample:
                bound = f"must be more than the {past.end_sample:,} after which the run went on"
                problems.append(Problem(f"step {row['step']}: samples", f"{consumed:,}", bound))
                break
    return problems


def _rows(path: Path) -> list[dict]:
    """The steps of a run; a line that a kill has cut off ends them."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise MissingInputError(input_problem("metrics", path, error=error)) from None
    rows = []
    for number, line in enumerate(content.splitlines(keepends=True), 1):
        if line.endswith(b"\n"):
            try:
                row = orjson.loads(line)
                rows.append({key: row[key] for key in ("step", "tokens", "windows")})
            except (orjson.JSONDecodeError, LookupError, TypeError) as error:
                where = f"{path} line {number}"
                raise DataError(Problem("metrics", where, f"is no step ({error})")) from None
    return rows
