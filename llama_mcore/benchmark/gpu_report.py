"""Report of what a machine with a GPU has shown, part by part: gpu-report.json, and gpu-report.md for people.

A part is a command in a process of its own, with a time limit. It tells each line of the report as soon as
it knows it (`tell`), so that one that hangs or crashes hides neither its own lines nor another part's. Both
files are written anew after each part; parts of several runs add up in one folder. tools/gpu_report.py has
the parts.
"""

import json
import os
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import psutil
from pydantic import TypeAdapter

from llama_mcore.benchmark.runner import markdown_table
from llama_mcore.errors import OutputError, Problem
from llama_mcore.files import published

JSON, PAGE = "gpu-report.json", "gpu-report.md"
LINES = "LLAMA_MCORE_REPORT_LINES"
"""Environment variable of a part: the file that its lines go to."""
EXIT_FAILED, EXIT_NO_GPU = 1, 69
MACHINE, GPU = "machine", "GPU"
"""The part that comes first, and its line that says whether there is any."""

_LOOK_S = 0.1
_SHORTEST_S = 10.0
"""A part that has less is not begun."""
_SHOWN = 25

Status = Literal["run", "failed", "unproven", "begun"]


@dataclass(frozen=True)
class Line:
    """One thing that a part shows."""

    name: str
    status: Status
    """run: it was done, and held; begun: what the part is at."""
    why: str = ""
    """It failed or is unproven; or what else is to be said."""
    measured: str = ""
    bar: str = ""
    """Bar for `measured`."""

    def __str__(self) -> str:
        figure = f"{self.measured}, {self.bar}" if self.bar else self.measured
        return "  ".join(text for text in (f"{self.status:9}{self.name}", figure, self.why) if text)


@dataclass(frozen=True)
class Part:
    name: str
    sentence: str
    limit_s: float
    lines: tuple[str, ...] = ()
    """Names of the lines that it reports if nothing fails; it may report more."""
    needs_gpu: bool = True


@dataclass(frozen=True)
class Outcome:
    """Result of a part."""

    sentence: str
    seconds: float = 0.0
    date: str = ""
    machine: str = ""
    """Card and versions that it ran on."""
    lines: list[Line] = field(default_factory=list)
    output: list[str] = field(default_factory=list)
    """The last that was printed, where something failed."""

    @property
    def status(self) -> Status:
        statuses: set[Status] = {line.status for line in self.lines}
        return "failed" if "failed" in statuses else "run" if "run" in statuses else "unproven"


Report = dict[str, Outcome]
"""By the name of the part."""
_REPORT = TypeAdapter(Report)


def tell(name: str, status: Status, why: str = "", measured: str = "", bar: str = "") -> None:
    """Add a line to the report of the part that this process belongs to; a later one of the same name takes
    its place. Outside a part, print it."""
    line = Line(name, status, " ".join(why.split()), measured, bar)
    if LINES not in os.environ:
        print(line, flush=True)
        return
    with Path(os.environ[LINES]).open("ab", buffering=0) as file:
        file.write(json.dumps(asdict(line)).encode() + b"\n")


@contextmanager
def showing(name: str) -> Iterator[dict[str, str]]:
    """Report a line for this block: that it ran, or failed by an AssertionError, whose message says why.

    The dictionary takes `measured` and `bar`."""
    said: dict[str, str] = {}
    tell(name, "begun")
    try:
        yield said
    except AssertionError as error:
        tell(name, "failed", str(error), **said)
    else:
        tell(name, "run", **said)


def check(holds: bool, failure: str) -> None:
    """Fail the block of `showing` around it with `why` unless `holds`."""
    if not holds:
        raise AssertionError(failure)


def run_parts(
    parts: Sequence[Part], command: Callable[[Part], list[str]], folder: Path, budget_s: float | None = None
) -> int:
    """Run the parts one after the other, the first of which looks at the machine, and print and write what
    comes of them to `folder`, beside what is there. `budget_s`: seconds for all together.

    Returns the exit code. Raises OutputError where the folder holds another report or cannot be written.
    """
    report = read_report(folder)
    write_report(folder, report)
    until = time.monotonic() + (budget_s or float("inf"))
    codes, no_gpu, machine = {0}, "", ""
    for part in parts:
        limit_s = min(part.limit_s, until - time.monotonic())
        if no_gpu and part.needs_gpu:
            outcome = _not_run(part, f"no GPU here: {no_gpu}")
        elif limit_s < min(_SHORTEST_S, part.limit_s):
            outcome = _not_run(part, f"the time was up; --part {part.name} runs it alone")
        else:
            print(f"\n{part.name}: {part.sentence}", flush=True)
            outcome = run_part(part, command(part), folder, limit_s, machine)
        if part.name == MACHINE:
            no_gpu, machine = _missing_gpu(outcome), _described(outcome)
            codes |= {EXIT_NO_GPU} if no_gpu else set()
        codes |= {EXIT_FAILED} if outcome.status == "failed" else set()
        report = merged(report, part.name, outcome)
        write_report(folder, report)
    print(f"\n{verdict(report)}\n{folder / PAGE}", flush=True)
    return EXIT_FAILED if EXIT_FAILED in codes else max(codes)


def run_part(part: Part, command: Sequence[str], folder: Path, limit_s: float, machine: str = "") -> Outcome:
    """Run one part, whose output goes to FOLDER/NAME.log, and end all that it started."""
    told, log = folder / f"{part.name}.jsonl", folder / f"{part.name}.log"
    told.write_bytes(b"")
    started = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | {LINES: str(told)},
            start_new_session=True,
        )
        try:
            in_time = _follow(process, told, started + limit_s)
        finally:
            _end(process)
    fate = _fate(process.returncode) if in_time else f"took longer than {limit_s:.0f} s and was ended"
    outcome = Outcome(
        part.sentence,
        round(time.monotonic() - started, 1),
        datetime.now(UTC).date().isoformat(),
        machine,
        _settled(_told(told), part.lines, fate),
    )
    if outcome.status != "failed":
        return outcome
    return replace(outcome, output=log.read_text(errors="replace").splitlines()[-_SHOWN:])


def _follow(process: subprocess.Popen[bytes], told: Path, until: float) -> bool:
    """Print lines as they come; return whether the process ended in time."""
    shown: dict[str, Line] = {}
    while True:
        ended, late = process.poll() is not None, time.monotonic() > until
        lines = _told(told)
        for name, line in lines.items():
            if line.status != "begun" and shown.get(name) != line:
                print(f"  {line}", flush=True)
        shown = lines
        if ended or late:
            return ended
        time.sleep(_LOOK_S)


def _end(leader: subprocess.Popen[bytes]) -> None:
    """Kill what is left: all that descends from the part, and what is in its session without a parent."""
    family: list[psutil.Process] = []
    with suppress(psutil.NoSuchProcess):
        family = psutil.Process(leader.pid).children(recursive=True)
    for process in psutil.process_iter():
        with suppress(psutil.NoSuchProcess, OSError):
            if process in family or os.getsid(process.pid) == leader.pid:
                process.kill()
    leader.wait()


def _fate(code: int) -> str:
    """Description of how a process failed; empty if it did not."""
    if code == 0:
        return ""
    return f"died by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def _told(path: Path) -> dict[str, Line]:
    """The newest line of each name, the name's first place kept; a torn line is yet to come."""
    rows = path.read_bytes().splitlines(keepends=True)
    lines = [Line(**json.loads(row)) for row in rows if row.endswith(b"\n")]
    return {line.name: line for line in lines}


def _settled(told: dict[str, Line], expected: Sequence[str], fate: str) -> list[Line]:
    """All lines of a finished part: none is left open, and what went wrong is on one of them."""
    how = f"the part {fate or 'ended'}"
    lines = [
        replace(line, status="failed", why=f"at work when {how}") if line.status == "begun" else line
        for line in told.values()
    ]
    lines += [Line(name, "unproven", f"{how} before it") for name in expected if name not in told]
    if fate and not any(line.status == "failed" for line in lines):
        lines.append(Line("the part as a whole", "failed", fate))
    return lines


def _not_run(part: Part, why: str) -> Outcome:
    names = part.lines or (part.sentence,)
    return Outcome(part.sentence, lines=[Line(name, "unproven", why) for name in names])


def _missing_gpu(machine: Outcome) -> str:
    """Reason why there is no GPU; empty if there is one."""
    (line,) = (line for line in machine.lines if line.name == GPU)
    return "" if line.status == "run" else line.why or "none was found"


def _described(machine: Outcome) -> str:
    return "; ".join(f"{line.name} {line.measured}" for line in machine.lines if line.measured)


def merged(report: Report, name: str, outcome: Outcome) -> Report:
    """The report with the new result of a part, unless the earlier one showed something and this does not."""
    before = report.get(name)
    if before and before.status != "unproven" and outcome.status == "unproven":
        return report
    return report | {name: outcome}


def read_report(folder: Path) -> Report:
    """Report in a folder; an empty one if it has none. Raises OutputError for a file that is not a report."""
    path = folder / JSON
    if not path.exists():
        return {}
    try:
        return _REPORT.validate_json(path.read_bytes())
    except (OSError, ValueError):
        reason = f"holds a {JSON} that is none of ours"
        raise OutputError(Problem("--output", folder, reason, "choose another folder")) from None


def write_report(folder: Path, report: Report) -> None:
    with published(folder / JSON) as temporary:
        temporary.write_bytes(_REPORT.dump_json(report, indent=2) + b"\n")
    with published(folder / PAGE) as temporary:
        temporary.write_text(page(report), encoding="utf-8")


def verdict(report: Report) -> str:
    lines = [line for outcome in report.values() for line in outcome.lines]
    statuses = [line.status for line in lines]
    counts = ", ".join(f"{statuses.count(status)} {status}" for status in ("run", "failed", "unproven"))
    return f"{len(lines)} lines: {counts}"


def page(report: Report) -> str:
    """Markdown that also reads well as it is."""
    sections = [f"## {name}: {o.status}\n\n{_section(o)}\n" for name, o in report.items()]
    return "\n".join([f"# GPU report\n\n{verdict(report)}.\n", *sections])


def _section(outcome: Outcome) -> str:
    when = f" {outcome.date}, {outcome.seconds:.0f} s. {outcome.machine}" if outcome.date else ""
    columns = ("status", "name", "measured", "bar", "why")
    rows = [
        {column: getattr(line, column).replace("|", "\\|") for column in columns}
        for line in _together(outcome.lines)
    ]
    parts = [f"{outcome.sentence}.{when}".rstrip()]
    if rows:
        parts.append(markdown_table(rows))
    if outcome.output:
        parts.append("\n".join(["The last that it printed:\n", *(f"    {row}" for row in outcome.output)]))
    return "\n\n".join(parts)


def _together(lines: Sequence[Line]) -> list[Line]:
    """Cases of one test, name[case], that have nothing to say of their own as one line."""

    def shared(line: Line) -> Line:
        plain = line.status != "failed" and not line.measured
        return replace(line, name=line.name.partition("[")[0]) if plain else line

    counts = Counter(map(shared, lines))
    names = {shared(line): line.name for line in lines}
    return [
        replace(line, name=f"{line.name}, {count} cases" if count > 1 else names[line])
        for line, count in counts.items()
    ]
