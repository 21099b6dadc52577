"""`llama-mcore preflight`: what would stop a run, found from every rank before it begins.

    each rank      its data, the run's folder, room on the disk, memory
    rank 0         what a start would do in the run's folder
    all together   an all_reduce, clocks, versions

No model is built, so it takes seconds; ranks that do not answer are given up after a minute, and before that
a file system that does not answer one of them.
"""

import socket
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import TypeVar

import torch.distributed as dist

from llama_mcore.config.schema import RunConfig
from llama_mcore.diagnose.allreduce import all_reduce_speed
from llama_mcore.diagnose.checks_node import kernels, memory, run_folder, shared_mark
from llama_mcore.diagnose.checks_run import data, free_space, start
from llama_mcore.diagnose.doctor import as_json_text, as_text
from llama_mcore.diagnose.finding import Finding, problem_of
from llama_mcore.diagnose.limited import LIMIT_S, within
from llama_mcore.diagnose.versions import versions
from llama_mcore.distributed.groups import Groups, process_groups
from llama_mcore.errors import PreflightError, Problem
from llama_mcore.train.consistency import REMEDY, Difference, contents_of, differences, settings_of, where

LIMIT = timedelta(seconds=60)
LARGEST_SKEW_S = 5.0
"""Leases, logs and the ledger of time compare clocks of different nodes."""
SLOW = 0.5
"""Of the median of its kind: so slow a group is worth a look."""
SLOW_REMEDY = "compare that node's links with the others', e.g. by ibstat and nvidia-smi topo -m"
NETWORK_REMEDY = "look at NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME; NCCL_DEBUG=INFO says more"


T = TypeVar("T")
DATA, START, FOLDER = ("data", "datasets"), ("run folder", "start"), ("run folder", "run.dir")
"""Group and name of a look at a file system."""
Look = Callable[[], list[Finding]]
StartCheck = Callable[[RunConfig], list[Finding]]
"""Says what a start would do in the run's folder, or what would refuse it there."""


@dataclass(frozen=True)
class Speed:
    """Of an all_reduce in a group of this rank."""

    kind: str
    ranks: int
    bytes_per_s: float


@dataclass(frozen=True)
class Report:
    """What a rank tells the others."""

    host: str
    clock: float
    """Seconds since 1970, when all ranks had come together."""
    versions: dict[str, str]
    speeds: list[Speed]
    findings: list[Finding]


def preflight(run: RunConfig, as_json: bool = False, start: StartCheck = start) -> None:
    """Print, on rank 0, what all ranks found. All ranks call it. PreflightError, with all problems, on every
    rank where a run could not start."""
    with process_groups(run.parallel, run.run.seed, LIMIT) as groups:
        findings = examine(run, groups, start)
        if groups.rank == 0:
            print(as_json_text(findings) if as_json else as_text(findings), flush=True)
        problems = [problem_of(finding) for finding in findings if finding.stops_training]
        if problems:
            raise PreflightError(problems)


def examine(run: RunConfig, groups: Groups, start: StartCheck = start) -> list[Finding]:
    """Everything, the same on every rank."""
    try:
        speeds = _measured(groups)
        ahead, findings, contents = _look_at_run(run, groups, start)
        unlike = differences(settings_of(run), contents, groups)
        reports = _reports(run, groups, speeds, ahead, findings)
    except (RuntimeError, ArithmeticError) as error:
        raise PreflightError(Problem("collectives", str(error), "must work", NETWORK_REMEDY)) from None
    return [*_merged(reports), *_speeds(reports), _clocks(reports), *_alike(unlike), *_versions(reports)]


def _measured(groups: Groups) -> list[Speed]:
    kinds = (("tp", groups.tp_size, groups.tp_group), ("dp", groups.dp_size, groups.dp_group))
    return [
        Speed("ranks", groups.world_size, all_reduce_speed(groups.device)),
        *(
            Speed(f"ranks of {kind}", size, all_reduce_speed(groups.device, group))
            for kind, size, group in kinds
            if size > 1
        ),
    ]


def _look_at_run(
    run: RunConfig, groups: Groups, start: StartCheck
) -> tuple[list[Finding], list[Finding], dict[str, str]]:
    """What a start would do, as rank 0 sees it for all; what this rank finds; the content of its data."""
    contents: dict[str, str] = {}

    def look_at_data() -> list[Finding]:
        findings, sources = data(run)
        contents.update(contents_of(sources))
        return findings

    looks: dict[tuple[str, str], Look] = {DATA: look_at_data}
    if groups.rank == 0:
        looks[START] = lambda: start(run)
    found = within(LIMIT_S, looks)
    ahead = _gathered(found.get(START, []), groups)[0]
    silent = [_silent(*name) for name in looks if name not in found]
    return ahead, [*found.get(DATA, []), *silent], contents if DATA in found else {}


def _reports(
    run: RunConfig, groups: Groups, speeds: list[Speed], ahead: list[Finding], findings: list[Finding]
) -> list[Report]:
    """Of every rank: what it found so far, and what its node can tell."""
    answers = bool(ahead)  # else rank 0 could not even make the folder for the others
    with shared_mark(Path(run.run.dir)) if groups.rank == 0 and answers else nullcontext("") as mark:
        mark = _gathered(mark, groups)[0]
        dist.barrier()
        clock, host = time.time(), socket.gethostname()
        ranks_here = Counter(_gathered(host, groups))[host]
        folder = _look_at_folder(run, groups.rank, mark) if answers else []
        here = [*ahead, *findings, *folder, *memory(run, groups.world_size, ranks_here), *kernels(run)]
        return _gathered(Report(host, clock, versions(), speeds, here), groups)


def _look_at_folder(run: RunConfig, rank: int, mark: str) -> list[Finding]:
    looks: dict[tuple[str, str], Look] = {
        FOLDER: lambda: [run_folder(Path(run.run.dir), rank, mark), free_space(run)]
    }
    return within(LIMIT_S, looks).get(FOLDER, [_silent(*FOLDER)])


def _silent(group: str, name: str) -> Finding:
    value, meaning = f"no answer in {LIMIT_S:g} s", "a file system hangs"
    remedy = "look at its mounts there; what waits for one cannot be killed"
    return Finding(group, name, "problem", value, meaning, remedy, required=True)


def _gathered(mine: T, groups: Groups) -> list[T]:
    everyone: list[T | None] = [None] * groups.world_size
    dist.all_gather_object(everyone, mine)
    return [one for one in everyone if one is not None]


def _merged(reports: Sequence[Report]) -> list[Finding]:
    """A finding once, however many ranks have it: before those of rank 0 what others miss or should know."""
    ranks_of: dict[Finding, list[int]] = defaultdict(list)
    for rank, report in enumerate(reports):
        for finding in report.findings:
            ranks_of[finding].append(rank)
    problems = [
        replace(finding, value=f"{finding.value} ({where(ranks, [report.host for report in reports])})")
        for finding, ranks in ranks_of.items()
        if finding.status != "ok"
    ]
    failed = {(finding.group, finding.name) for finding in problems}
    sound = [one for one in reports[0].findings if one.status == "ok" and (one.group, one.name) not in failed]
    return sorted([*problems, *sound], key=lambda finding: _ORDER.index(finding.group))


_ORDER = ("data", "run folder", "memory", "kernels")


def _speeds(reports: Sequence[Report]) -> list[Finding]:
    """The slowest group of each kind: it is the one that all others wait for."""
    return [
        _slowest([report.speeds[kind] for report in reports], reports)
        for kind in range(len(reports[0].speeds))
    ]


def _slowest(speeds: Sequence[Speed], reports: Sequence[Report]) -> Finding:
    """Of the groups of one kind; `speeds`: of each rank's."""
    slowest, host = min(
        ((speed, report.host) for speed, report in zip(speeds, reports, strict=True)),
        key=lambda one: one[0].bytes_per_s,
    )
    name = f"{slowest.ranks} {slowest.kind}"
    value = f"{slowest.bytes_per_s / 1e9:.2f} GB/s, the slowest on {host}"
    meaning = "an all_reduce of 16 MB: the buffer's size by the time that it takes"
    usual = median(speed.bytes_per_s for speed in speeds)
    # The ranks of a single group wait for each other: how they differ is noise.
    if slowest.ranks == len(reports) or slowest.bytes_per_s >= SLOW * usual:
        return Finding("collectives", name, "ok", value, meaning, required=True)
    meaning = f"less than half of the usual {usual / 1e9:.2f} GB/s: every step waits for this group"
    return Finding("collectives", name, "note", value, meaning, SLOW_REMEDY, required=True)


def _clocks(reports: Sequence[Report]) -> Finding:
    ordered = sorted(reports, key=lambda report: report.clock)
    skew = ordered[-1].clock - ordered[0].clock
    value = f"{skew:.1f} s between the first and the last"
    if skew <= LARGEST_SKEW_S:
        return Finding("nodes", "clocks", "ok", value, required=True)
    meaning = f"{ordered[0].host} is behind {ordered[-1].host}; must be within {LARGEST_SKEW_S:g} s"
    return Finding("nodes", "clocks", "problem", value, meaning, "set the clocks by NTP", required=True)


def _alike(unlike: Sequence[Difference]) -> list[Finding]:
    if not unlike:
        value = "equal on all ranks, and so is the data"
        return [Finding("nodes", "settings", "ok", value, required=True)]
    return [
        Finding(
            "nodes",
            one.name,
            "problem",
            f"{one.value} ({one.where})",
            f"but {one.expected} on rank 0",
            REMEDY,
            required=True,
        )
        for one in unlike
    ]


def _versions(reports: Sequence[Report]) -> list[Finding]:
    """One finding for what is equal, one for each version that is not."""
    findings = []
    for name in reports[0].versions:
        counts = Counter(report.versions.get(name, "none") for report in reports)
        if len(counts) == 1:
            continue
        usual = counts.most_common(1)[0][0]
        others = [rank for rank, one in enumerate(reports) if one.versions.get(name, "none") != usual]
        found = reports[others[0]].versions.get(name, "none")
        meaning = f"is {usual} on the other nodes ({where(others, [report.host for report in reports])})"
        remedy = "install the same on all nodes, from requirements.txt"
        findings.append(Finding("nodes", name, "problem", found, meaning, remedy, required=True))
    if not findings:
        shown = ", ".join(f"{name} {version}" for name, version in reports[0].versions.items())
        findings.append(Finding("nodes", "versions", "ok", f"equal on all ranks: {shown}", required=True))
    return findings
