"""`llama-mcore preflight`: problems that would stop a run, found from every rank before it begins.

    each rank      its data, the run's folder, space on the disk, memory
    rank 0         the effect of a start in the run's folder
    all together   an all_reduce, clocks, versions

No model is built, so it takes seconds; it waits a minute for ranks that do not answer, and less for a file
system that does not answer one of them.
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

import torch.distributed as dist

from llama_mcore.background import run_with_timeout
from llama_mcore.config.schema import RunConfig
from llama_mcore.diagnose.allreduce import all_reduce_speed
from llama_mcore.diagnose.checks_node import kernels, memory, run_folder, shared_mark, versions
from llama_mcore.diagnose.checks_run import data, free_space, start
from llama_mcore.diagnose.finding import Finding, as_json_text, as_text, problem_of
from llama_mcore.distributed.collectives import gather_on_all_ranks
from llama_mcore.distributed.groups import Groups, process_groups
from llama_mcore.errors import PreflightError, Problem
from llama_mcore.train.consistency import REMEDY, Difference, contents_of, differences, settings_of, where

LIMIT = timedelta(seconds=60)
FILES_LIMIT_S = 25.0
"""Seconds for a check of files: two in a row leave time within the LIMIT of ranks that wait."""
LARGEST_SKEW_S = 5.0
"""Leases, logs and timelines compare clocks of different nodes."""
SLOW = 0.5
"""Share of the median of its kind below which a group's speed is reported."""
SLOW_REMEDY = "compare that node's links with the others', e.g. by ibstat and nvidia-smi topo -m"
NETWORK_REMEDY = "check NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME; NCCL_DEBUG=INFO shows details"


DATA, START, FOLDER = ("data", "datasets"), ("run folder", "start"), ("run folder", "run.dir")
"""Group and name of a check of files."""
Check = Callable[[], list[Finding]]
StartCheck = Callable[[RunConfig], list[Finding]]
"""Findings on a start in the run's folder, as by `checks_run.start`."""


@dataclass(frozen=True)
class Speed:
    """Speed of an all_reduce in a group of this rank."""

    kind: str
    ranks: int
    bytes_per_s: float


@dataclass(frozen=True)
class Report:
    """Report of a rank to the others."""

    host: str
    clock: float
    """Seconds since 1970, right after a barrier of all ranks."""
    versions: dict[str, str]
    speeds: list[Speed]
    findings: list[Finding]


def preflight(run: RunConfig, as_json: bool = False, start: StartCheck = start) -> None:
    """Print, on rank 0, the findings of all ranks.

    Raises PreflightError on every rank, with all problems, where a run could not start.
    Collective: all ranks call it.
    """
    with process_groups(run.parallel, run.run.seed, LIMIT) as groups:
        findings = examine(run, groups, start)
        if groups.rank == 0:
            print(as_json_text(findings) if as_json else as_text(findings), flush=True)
        problems = [problem_of(finding) for finding in findings if finding.stops_training]
        if problems:
            raise PreflightError(problems)


def examine(run: RunConfig, groups: Groups, start: StartCheck = start) -> list[Finding]:
    """All findings, the same on every rank.

    Collective: all ranks call it.
    """
    try:
        speeds = _measured(groups)
        ahead, findings, contents = _check_files(run, groups, start)
        unlike = differences(settings_of(run), contents, groups)
        reports = _reports(run, groups, speeds, ahead, findings)
    except (RuntimeError, ArithmeticError) as error:
        raise PreflightError(Problem("collectives", str(error), "must work", NETWORK_REMEDY)) from None
    return [
        *_merged(reports),
        *_speeds(reports),
        _clocks(reports),
        *_settings(unlike),
        *_versions(reports),
    ]


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


def _check_files(
    run: RunConfig, groups: Groups, start: StartCheck
) -> tuple[list[Finding], list[Finding], dict[str, str]]:
    """Rank 0's findings on a start, for all; this rank's on its data; the content of that data.

    Collective: all ranks call it.
    """
    contents: dict[str, str] = {}

    def check_data() -> list[Finding]:
        findings, sources = data(run)
        contents.update(contents_of(sources))
        return findings

    checks: dict[tuple[str, str], Check] = {DATA: check_data}
    if groups.rank == 0:
        checks[START] = lambda: start(run)
    found = run_with_timeout(FILES_LIMIT_S, checks)
    ahead = gather_on_all_ranks(groups, found.get(START, []))[0]
    silent = [_silent(*name) for name in checks if name not in found]
    return ahead, [*found.get(DATA, []), *silent], contents if DATA in found else {}


def _reports(
    run: RunConfig, groups: Groups, speeds: list[Speed], ahead: list[Finding], findings: list[Finding]
) -> list[Report]:
    """Reports of all ranks: the findings so far, and those on their nodes.

    Collective: all ranks call it.
    """
    responds = bool(ahead)  # else rank 0 could not even make the folder for the others
    with shared_mark(Path(run.run.dir)) if groups.rank == 0 and responds else nullcontext("") as mark:
        mark = gather_on_all_ranks(groups, mark)[0]
        dist.barrier()
        clock, host = time.time(), socket.gethostname()
        ranks_here = Counter(gather_on_all_ranks(groups, host))[host]
        folder = _check_folder(run, groups.rank, mark) if responds else []
        documents = run.data.attention_boundary is not None
        here = [
            *(*ahead, *findings, *folder),
            *memory(run, groups.world_size, ranks_here),
            *kernels(run.model, run.train.precision, documents),
        ]
        return gather_on_all_ranks(groups, Report(host, clock, versions(), speeds, here))


def _check_folder(run: RunConfig, rank: int, mark: str) -> list[Finding]:
    def check() -> list[Finding]:
        return [run_folder(Path(run.run.dir), rank, mark), free_space(run)]

    return run_with_timeout(FILES_LIMIT_S, {FOLDER: check}).get(FOLDER, [_silent(*FOLDER)])


def _silent(group: str, name: str) -> Finding:
    value, meaning = f"no answer within {FILES_LIMIT_S:g} s", "a file system hangs"
    remedy = "check that node's mounts; a process that waits for one cannot be killed"
    return Finding(group, name, "problem", value, meaning, remedy, required=True)


def _merged(reports: Sequence[Report]) -> list[Finding]:
    """Findings of all ranks, each once: problems and notes with their ranks, then what is ok on all."""
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
    passed = [
        one for one in reports[0].findings if one.status == "ok" and (one.group, one.name) not in failed
    ]
    return sorted([*problems, *passed], key=lambda finding: _ORDER.index(finding.group))


_ORDER = ("data", "run folder", "memory", "kernels")


def _speeds(reports: Sequence[Report]) -> list[Finding]:
    """Findings on the slowest group of each kind, which all others wait for."""
    return [
        _slowest([report.speeds[kind] for report in reports], reports)
        for kind in range(len(reports[0].speeds))
    ]


def _slowest(speeds: Sequence[Speed], reports: Sequence[Report]) -> Finding:
    """Finding on the slowest group of a kind. `speeds`: each rank's group's."""
    slowest, host = min(
        ((speed, report.host) for speed, report in zip(speeds, reports, strict=True)),
        key=lambda one: one[0].bytes_per_s,
    )
    name = f"{slowest.ranks} {slowest.kind}"
    value = f"{slowest.bytes_per_s / 1e9:.2f} GB/s, the slowest on {host}"
    meaning = "an all_reduce of 16 MB: the size of the buffer divided by the time"
    usual = median(speed.bytes_per_s for speed in speeds)
    # The ranks of a single group wait for each other: their differences are noise.
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
    meaning = f"{ordered[0].host} is behind {ordered[-1].host}: clocks must agree within {LARGEST_SKEW_S:g} s"
    return Finding(
        "nodes", "clocks", "problem", value, meaning, "synchronise the clocks by NTP", required=True
    )


def _settings(unlike: Sequence[Difference]) -> list[Finding]:
    if not unlike:
        value = "equal on all ranks, as is the data"
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
    """A finding for each version that differs; a single one if none does."""
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
