"""Bars and results of benchmarks, and how both are printed, written and checked."""

import json
import operator
import os
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import psutil
import torch

from llama_mcore.distributed.device import device_name, on_gpu
from llama_mcore.errors import ConfigError, Problem
from llama_mcore.files import prepare_output, published

LIBRARIES = ("torch", "megatron-core", "deepspeed", "transformers")
QUIET = 0.05
"""Share of the CPU that other processes may use before times are doubted."""

Relation = Literal["at most", "below", "at least"]
_HOLDS = {"at most": operator.le, "below": operator.lt, "at least": operator.ge}


@dataclass(frozen=True)
class Bar:
    """Limit that a measured quantity must keep."""

    quantity: str
    relation: Relation
    limit: float

    def holds(self, measured: float | None) -> bool:
        """False for a quantity that was not measured."""
        return measured is not None and _HOLDS[self.relation](measured, self.limit)


@dataclass(frozen=True)
class Result:
    """Result of one benchmark."""

    benchmark: str
    settings: dict[str, Any]
    table: list[dict[str, str]]
    """Rows for people: column -> text."""
    measured: dict[str, Any]
    """The same for programs, with every sample."""
    quantities: dict[str, float]
    """Quantities that bars are stated about."""
    figure: str
    """The conclusion: the last line of the output."""
    bars: Sequence[Bar] = ()
    notes: Sequence[str] = ()
    environment: dict[str, Any] = field(default_factory=lambda: environment())

    @property
    def held(self) -> bool:
        return all(bar.holds(self.quantities.get(bar.quantity)) for bar in self.bars)


def use_all_cores() -> None:
    """Use the whole machine in one process, whatever OMP_NUM_THREADS says."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))


class OtherWork:
    """Share of this machine's CPU that other processes use meanwhile: timings need it near 0."""

    def __init__(self) -> None:
        self._started = self.seconds()

    def share(self) -> float:
        """Share from 0 to 1 since the start."""
        busy, own, now = (end - start for end, start in zip(self.seconds(), self._started, strict=True))
        return max(0.0, busy - own) / (now * (os.cpu_count() or 1))

    @staticmethod
    def seconds() -> tuple[float, float, float]:
        """Seconds that all cores worked, that this process and its past children did, and on the clock."""
        all_cores, own = psutil.cpu_times(), psutil.Process().cpu_times()
        busy = all_cores.user + all_cores.nice + all_cores.system
        ours = own.user + own.system + own.children_user + own.children_system
        return busy, ours, time.monotonic()


def quietness(others_share: float) -> str:
    """Share of the CPU that other processes used meanwhile (OtherWork); a doubt of the times if large."""
    doubt = ": repeat on a quiet machine, the times are not to be trusted" if others_share > QUIET else ""
    return f"other processes used {others_share:.0%} of the CPU meanwhile{doubt}"


def environment() -> dict[str, Any]:
    """Date, versions and kind of machine; neither its name nor its owner."""
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in LIBRARIES},
        "machine": platform.machine(),
        "cores": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "device": device_name(),
    }


def check_request(benchmark: str, bars: Sequence[Bar], json_file: Path | None, check: bool) -> None:
    """Refuse a check of nothing, an output that cannot be written and several ranks, before anything runs."""
    if check and not bars:
        reason = "no bar is stated for these settings on this device"
        raise ConfigError(Problem("--check", benchmark, reason, "see docs/benchmarks.md for those that are"))
    if (ranks := os.environ.get("WORLD_SIZE", "1")) != "1":
        raise ConfigError(Problem("WORLD_SIZE", ranks, "must be 1", "start the benchmark without torchrun"))
    if json_file:
        prepare_output(json_file)


def finish(result: Result, json_file: Path | None, check: bool) -> int:
    """Print and write the result; return the exit code: 1 if `check` and a bar is not held."""
    print(describe(result))
    if json_file:
        with published(json_file) as temporary:
            temporary.write_text(json.dumps(as_json(result), indent=2) + "\n", encoding="utf-8")
    return 1 if check and not result.held else 0


def as_json(result: Result) -> dict[str, Any]:
    bars = [
        {
            **asdict(bar),
            "measured": result.quantities.get(bar.quantity),
            "held": bar.holds(result.quantities.get(bar.quantity)),
        }
        for bar in result.bars
    ]
    return {**asdict(result), "bars": bars, "held": result.held}


def describe(result: Result) -> str:
    """Environment, table, notes and bars; the last line is the figure."""
    found = result.environment
    device = found["device"] if on_gpu() else f"{found['cores']} cores {found['machine']}"
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    lines = [
        f"{result.benchmark} on {device} ({found['cpu_capability']}), {found['date']}",
        f"Python {found['python']}, {versions}",
        ", ".join(f"{name} {value}" for name, value in result.settings.items()),
        "",
        markdown_table(result.table),
        "",
        *result.notes,
        *(_describe_bar(bar, result.quantities.get(bar.quantity)) for bar in result.bars),
        result.figure,
    ]
    return "\n".join(lines)


def markdown_table(rows: Sequence[dict[str, str]]) -> str:
    """Rows under the columns of the first, padded so that it also reads well as plain text."""
    columns = list(rows[0])
    lines = [columns, *([row[column] for column in columns] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    rule = ["-" * width for width in widths]
    padded = (
        [cell.ljust(width) for cell, width in zip(line, widths, strict=True)]
        for line in [lines[0], rule, *lines[1:]]
    )
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)


def say(text: str) -> None:
    """Print progress, apart from the result, which goes to stdout."""
    print(text, file=sys.stderr, flush=True)


def _describe_bar(bar: Bar, measured: float | None) -> str:
    found = "not measured" if measured is None else f"{measured:.3f}"
    verdict = "held" if bar.holds(measured) else "NOT HELD"
    return f"bar: {bar.quantity} {found}, {bar.relation} {bar.limit:g}: {verdict}"
