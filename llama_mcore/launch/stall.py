"""What is left of a run that stalled: the stacks of every rank, and the names of those that are behind.

    RUN_DIR/stalls/00000012/rank-00003.txt     stacks of its threads
    RUN_DIR/stalls/00000012/rank-00003.json    its heartbeat
    RUN_DIR/stalls/00000012/summary.txt        rank 0's: who is behind

All ranks stall together, since those that are well wait for the others in a collective. So each rank reports
on itself, and rank 0 reads the reports of all.
"""

import json
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from llama_mcore.launch.heartbeat import Heartbeat
from llama_mcore.launch.rank_on_host import RankOnHost
from llama_mcore.small_file import read_json

FOLDER = "stalls"
SUMMARY = "summary.txt"
SILENT_S = 3.0
"""Python that has run nothing for so long is stopped, or one thread keeps it to itself."""
COLLECT_S = 15.0
"""How long rank 0 waits for the reports of the others, and they for its summary."""
_LONGEST_LIST = 8
_LARGEST_REPORT = 1 << 16
_POLL_S = 0.1


@dataclass(frozen=True)
class Report:
    """What the supervisor of a rank knows of its process."""

    rank: int
    host: str
    pid: int
    phase: str
    step: int
    beats: int
    since_beat_s: float
    since_alive_s: float
    state: str
    """The kernel's word for it: running, sleeping, disk-sleep, stopped."""
    waits_in: str
    """The kernel function that it sleeps in, where that may be read."""
    written: float
    """Seconds since 1970: a later life may stall at the same step."""

    @property
    def silent(self) -> bool:
        return self.since_alive_s > SILENT_S

    def __str__(self) -> str:
        why = ""
        if self.silent:
            doing = "stopped" if self.state == "stopped" else f"{self.state}, and no Python thread ran"
            why = f" ({doing} for {self.since_alive_s:.0f} s)"
        return f"rank {self.rank} on {self.host}{why}"


def take_report(place: RankOnHost, pid: int, heartbeat: Heartbeat) -> Report:
    now, beat = time.monotonic(), heartbeat.read()
    return Report(
        rank=place.rank,
        host=place.host,
        pid=pid,
        phase=beat.phase.value,
        step=beat.step,
        beats=beat.count,
        since_beat_s=round(now - beat.at, 3),
        since_alive_s=round(now - heartbeat.alive_at(), 3),
        state=_state(pid),
        waits_in=_waits_in(pid),
        written=time.time(),
    )


class StallReport:
    """Made when the supervisor starts; `write` says what it found when the rank has stalled."""

    def __init__(self, run_dir: Path, place: RankOnHost) -> None:
        self._folder, self._place, self._since = run_dir / FOLDER, place, time.time()

    def write(self, mine: Report, stacks: str) -> str:
        """Write this rank's part; on rank 0 return the summary, on others wait until it is there and return
        nothing. What cannot be written is left out."""
        folder = self._folder / f"{mine.step:08d}"
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            name = f"rank-{mine.rank:05d}"
            (folder / f"{name}.txt").write_text(stacks or _no_stacks(mine), encoding="utf-8")
            _replace(folder / f"{name}.json", json.dumps(asdict(mine)))
            if self._place.rank > 0:
                _wait_until(lambda: any(self._is_new(path) for path in self._near(mine.step, SUMMARY)))
                return ""
        if self._place.rank > 0:
            return ""
        text = summary(self._reports(mine), self._place.world_size, folder)
        with suppress(OSError):
            _replace(folder / SUMMARY, text + "\n")
        return text

    def _reports(self, mine: Report) -> list[Report]:
        found = {mine.rank: mine}

        def all_there() -> bool:
            for path in self._near(mine.step, "rank-*.json"):
                report = _read(path)
                if report and report.written >= self._since:
                    found[report.rank] = report
            return len(found) == self._place.world_size

        _wait_until(all_there)
        return [found[rank] for rank in sorted(found)]

    def _near(self, step: int, pattern: str) -> list[Path]:
        """A rank may have begun the next step while another has not."""
        with suppress(OSError):
            steps = range(max(0, step - 1), step + 2)
            return [path for near in steps for path in (self._folder / f"{near:08d}").glob(pattern)]
        return []

    def _is_new(self, path: Path) -> bool:
        with suppress(OSError):
            return path.stat().st_mtime >= self._since
        return False


def behind(reports: Sequence[Report]) -> list[Report]:
    """Those that the others wait for: silent ones; else those that did least, unless all did the same."""
    silent = [report for report in reports if report.silent]
    if silent:
        return silent
    fewest = min(report.beats for report in reports)
    last = [report for report in reports if report.beats == fewest]
    return last if len(last) < len(reports) else []


def summary(reports: Sequence[Report], world_size: int, folder: Path) -> str:
    """Who is behind, in a few lines. `reports`: rank 0's, and those of other ranks that came."""
    first = reports[0]
    lines = [
        f"stalled in {first.phase} of step {first.step}: no sign of life for {first.since_beat_s:.0f} s; "
        "ending with exit code 75"
    ]
    late = behind(reports)
    if late:
        lines.append(f"behind: {_shortened([str(report) for report in late])}")
    missing = sorted(set(range(world_size)) - {report.rank for report in reports})
    if missing:
        lines.append(f"no report from: {_shortened([f'rank {rank}' for rank in missing])}")
    if not late and not missing:
        lines.append("behind: no rank more than the others; their stacks may tell")
    lines.append(f"stacks: {folder}")
    return "\n".join(lines)


def _shortened(names: Sequence[str]) -> str:
    more = len(names) - _LONGEST_LIST
    return ", ".join(names[:_LONGEST_LIST]) + (f", and {more} more" if more > 0 else "")


def _no_stacks(report: Report) -> str:
    where = f" in {report.waits_in}" if report.waits_in else ""
    return f"process {report.pid} does not answer: it is {report.state}{where}\n"


def _state(pid: int) -> str:
    try:
        return str(psutil.Process(pid).status())
    except psutil.Error:
        return "gone"


def _waits_in(pid: int) -> str:
    with suppress(OSError):
        name = Path(f"/proc/{pid}/wchan").read_text()
        return "" if name == "0" else name
    return ""


def _read(path: Path) -> Report | None:
    """None where it is of another version or half there."""
    try:
        return Report(**read_json(path, _LARGEST_REPORT))
    except (OSError, ValueError, TypeError):
        return None


def _replace(path: Path, text: str) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _wait_until(holds: Callable[[], bool]) -> None:
    until = time.monotonic() + COLLECT_S
    while not holds() and time.monotonic() < until:
        time.sleep(_POLL_S)
