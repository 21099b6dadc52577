"""`llama-mcore audit-data`: a run's newest checkpoint and metrics compared with its data plan."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from llama_mcore.checkpoint.manifest import read_manifest
from llama_mcore.checkpoint.run_dir import find_checkpoint
from llama_mcore.checkpoint.train_state import Rollback
from llama_mcore.data.audit import FIX_LINES, check_ledger, check_uses, count_uses, use_table
from llama_mcore.errors import DataError, Problem
from llama_mcore.observe.metrics_file import (
    METRICS_FILE,
    Count,
    Row,
    as_ranges,
    counting,
    describe_steps,
    key_of,
    missing_steps,
    read_every_line,
)


class Ledger(Row):
    """Audited values of a step."""

    tokens: Count
    windows: dict[str, Count]


def audit_run(run_dir: Path) -> str:
    """Count from the data plan how often every window was read up to the newest checkpoint, and compare the
    lines of metrics.jsonl with that.

    Returns a table of plan against use and a conclusion. Raises DataError with every disagreement and the
    same table.
    """
    path = find_checkpoint(run_dir)
    manifest = read_manifest(path)
    segments, position = manifest.segments, manifest.consumed_samples
    if not segments:
        reason = "was converted from another format and has read no data yet: there is nothing to audit"
        raise DataError(Problem("checkpoint", path, reason, "train from it first"))
    expected = segments[-1].used(position)
    metrics = run_dir / METRICS_FILE
    lines = list(read_every_line(metrics, Ledger))
    rows = [lines[place] for place in counting([key_of(line) for line in lines])]
    with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("counting windows", total=sum(expected.values()))
        try:
            uses = count_uses(segments, position, lambda windows: progress.advance(task, windows))
        except MemoryError:
            reason, remedy = "need more memory than is available", "audit the run on a larger machine"
            raise DataError(
                Problem("windows", f"{path}: of {len(expected)} sources", reason, remedy)
            ) from None
    rollbacks = manifest.health.rollbacks if manifest.health else ()
    problems = [
        *_check_steps(metrics, lines, rows, manifest.step),
        *check_uses(uses),
        *check_ledger(segments, rows),
        *_check_jumps(rollbacks, rows, segments[-1].seq_length),
    ]
    if manifest.windows_read != expected:
        reason = f"must be {expected} by the data plan"
        remedy = "the checkpoint was changed: use an older one"
        problems.append(Problem(f"{path}: windows_read", manifest.windows_read, reason, remedy))
    table = use_table(segments, uses)
    if problems:
        last = problems[-1]
        problems[-1] = replace(last, remedy=f"{last.remedy}\nplan against use:\n{table}")
        raise DataError(problems)
    changed = f" over {len(segments)} plans" if len(segments) > 1 else ""
    jumped = [
        f"Samples {past.first_sample:,} to {past.end_sample:,} were read and abandoned: after step "
        f"{past.at_step:,} the run rolled back to step {past.to_step:,} ({past.reason}).\n"
        for past in rollbacks
    ]
    elsewhere = [
        f"Steps up to {row.step - 1:,} are those of {row.continues}.\n" for row in rows if row.continues
    ]
    return (
        f"{table}\n{''.join(jumped)}{''.join(elsewhere)}{position:,} samples and {len(rows):,} lines of "
        f"{METRICS_FILE}{changed}: no window was read more often than planned, and the recorded counts "
        "agree with the plan."
    )


def _check_steps(metrics: Path, lines: list[Ledger], rows: list[Ledger], last: int) -> list[Problem]:
    """Problems of steps up to `last`, the checkpoint's, that have no line or more than one that counts."""
    problems = []
    if missing := missing_steps([key_of(row) for row in rows], last):
        first, _ = missing[0]
        remedy = f"restore the file, or repeat the steps: --resume a checkpoint before step {first:,}"
        reason = "have no line, and every step must have one"
        problems.append(Problem(f"{metrics}: steps", describe_steps(missing), reason, remedy))
    counted = {id(row) for row in rows}
    if repeated := as_ranges(line.step for line in lines if id(line) not in counted):
        reason = "have several lines, and only that of the last attempt counts"
        remedy = "start the run again: it drops the others"
        problems.append(Problem(f"{metrics}: steps", describe_steps(repeated), reason, remedy))
    return problems


def _check_jumps(rollbacks: Sequence[Rollback], rows: list[Ledger], seq_length: int) -> list[Problem]:
    """Problems of steps after a rollback whose position lies in the samples that it abandoned."""
    problems = []
    for number, past in enumerate(rollbacks):
        if any(later.to_step < past.to_step for later in rollbacks[number:]):
            continue  # itself abandoned by a later rollback
        for row in rows:
            consumed = row.tokens // seq_length
            if row.step > past.to_step and consumed <= past.end_sample:
                reason = f"must be more than the {past.end_sample:,} after which the run went on"
                problems.append(Problem(f"step {row.step}: samples", f"{consumed:,}", reason, FIX_LINES))
                break
    return problems
