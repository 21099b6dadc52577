"""Report on a run that stalled: the stacks of every rank, and the ranks that are behind.

    RUN_DIR/stalls/00000012/rank-00003.txt     stacks of its threads
    RUN_DIR/stalls/00000012/rank-00003.json    its heartbeat
    RUN_DIR/stalls/00000012/summary.txt        rank 0's: who is behind
    RUN_DIR/stalls/00000012-2/                 the same, of another attempt that stalled at that step

All ranks stall together, since healthy ones wait for the others in a collective. So each rank reports on
itself, and rank 0 reads the reports of all.
"""

import faulthandler
import json
import os
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path

import psutil

from llama_mcore.distributed.launch_env import RankInfo
from llama_mcore.small_file import read_json
from llama_mcore.watchdog.heartbeat import Heartbeat

FOLDER = "stalls"
SUMMARY = "summary.txt"
SILENT_S = 3.0
"""A process in which no Python ran for so long is stopped, or one of its threads holds the interpreter's
lock."""
COLLECT_S = 15.0
"""Seconds that rank 0 waits for the others' reports, and they for its summary."""
STACKS_REQUEST = signal.SIGUSR2
STACKS_WAIT_S = 3.0
_STACKS_POLL_S = 0.05
_QUIET_POLLS = 4
"""A dump that has not grown during so many polls is complete."""
_LONGEST_LIST = 8
_LARGEST_REPORT = 1 << 16
_LONGEST_PAUSE_S = 4.0
"""Between two polls: thousands of ranks poll, and the file system may be what hangs."""


@dataclass(frozen=True)
class Report:
    """State of a training process, as its supervisor sees it."""

    rank: int
    host: str
    pid: int
    phase: str
    step: int
    beats: int
    since_beat_s: float
    since_alive_s: float
    state: str
    """By the kernel: running, sleeping, disk-sleep, stopped."""
    waits_in: str
    """Kernel function that it sleeps in, where that may be read."""
    written: float
    """Seconds since 1970."""

    @property
    def silent(self) -> bool:
        return self.since_alive_s > SILENT_S

    def __str__(self) -> str:
        why = ""
        if self.silent:
            doing = "stopped" if self.state == "stopped" else f"{self.state}, and no Python thread ran"
            why = f" ({doing} for {self.since_alive_s:.0f} s)"
        return f"rank {self.rank} on {self.host}{why}"


def take_report(place: RankInfo, pid: int, heartbeat: Heartbeat) -> Report:
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


class Stacks:
    """Python stacks of another process, taken from outside, so also while it holds the interpreter's lock.

    Made before the fork: the child answers, the parent asks.
    """

    def __init__(self) -> None:
        # Memory, not a file: what hangs may be the disk.
        self._file = os.memfd_create("stacks")

    def answer(self) -> None:
        """Let this process write the stacks of all its threads whenever it is asked."""
        # Written by the signal handler itself, in C, whatever Python is doing.
        faulthandler.register(STACKS_REQUEST, file=self._file, all_threads=True, chain=False)

    def ask(self, pid: int) -> str:
        """The stacks; empty where the process does not answer: it is stopped, or waits in the kernel."""
        os.ftruncate(self._file, 0)
        os.lseek(self._file, 0, os.SEEK_SET)
        os.kill(pid, STACKS_REQUEST)
        until = time.monotonic() + STACKS_WAIT_S
        size, quiet = 0, 0
        while time.monotonic() < until and quiet < _QUIET_POLLS:
            time.sleep(_STACKS_POLL_S)
            before, size = size, os.fstat(self._file).st_size
            quiet = quiet + 1 if size and size == before else 0
        return os.pread(self._file, size, 0).decode(errors="replace")


class StallReport:
    """Writer of the reports of one rank, made when its supervisor starts."""

    def __init__(self, run_dir: Path, place: RankInfo) -> None:
        self._folder, self._place, self._started = run_dir / FOLDER, place, time.monotonic()
        self._since = time.time()
        """Older folders belong to another attempt; by the file server's clock, once a file has shown that."""

    def write(self, mine: Report, stacks: str) -> str:
        """Write this rank's part; on rank 0 return the summary, on others wait until it exists and return "".
        What cannot be written is left out."""
        folder = self._folder / _name(mine.step)
        with suppress(OSError):
            folder = self._write_part(mine, stacks)
            if self._place.rank > 0:
                _wait_until(lambda: any((near / SUMMARY).exists() for near in self._near(mine.step)), 1.0)
        if self._place.rank > 0:
            return ""
        text = summary(self._reports(mine), self._place.world_size, folder)
        with suppress(OSError):
            _replace(folder / SUMMARY, text + "\n")
        return text

    def _write_part(self, mine: Report, stacks: str) -> Path:
        """Write stacks and heartbeat, and return their folder. Raises OSError."""
        self._folder.mkdir(parents=True, exist_ok=True)
        temporary = self._folder / f"{_rank_name(mine.rank)}.tmp"
        temporary.write_text(stacks or _no_stacks(mine), encoding="utf-8")
        self._since = temporary.stat().st_mtime - (time.monotonic() - self._started)
        folder = self._made_folder(mine.step)
        os.replace(temporary, folder / f"{_rank_name(mine.rank)}.txt")
        _replace(folder / f"{_rank_name(mine.rank)}.json", json.dumps(asdict(mine)))
        return folder

    def _made_folder(self, step: int) -> Path:
        """The first name of the step that no earlier attempt has taken, so the same on all ranks."""
        names = (self._folder / _name(step, number) for number in count(1))
        return next(folder for folder in names if _made(folder) or self._is_of_this_attempt(folder))

    def _reports(self, mine: Report) -> list[Report]:
        """Reports of all ranks that come in time; each file is read once."""
        found = {f"{_rank_name(mine.rank)}.json": mine}

        def all_there() -> bool:
            for folder in self._near(mine.step):
                for name in _listed(folder):
                    if name.endswith(".json") and name not in found and (report := _read(folder / name)):
                        found[name] = report
            return len(found) == self._place.world_size

        _wait_until(all_there, 0.1)
        return [found[name] for name in sorted(found)]

    def _near(self, step: int) -> list[Path]:
        """This attempt's folders of a step and its neighbours: one rank may have begun the next already."""
        names = {f"{near:08d}" for near in range(max(0, step - 1), step + 2)}
        folders = [self._folder / name for name in _listed(self._folder) if name.partition("-")[0] in names]
        return [folder for folder in folders if self._is_of_this_attempt(folder)]

    def _is_of_this_attempt(self, folder: Path) -> bool:
        with suppress(OSError):
            return folder.stat().st_mtime >= self._since
        return False


def behind(reports: Sequence[Report]) -> list[Report]:
    """Ranks that the others wait for: silent ones, else those with the fewest beats unless all have as
    many."""
    silent = [report for report in reports if report.silent]
    if silent:
        return silent
    fewest = min(report.beats for report in reports)
    last = [report for report in reports if report.beats == fewest]
    return last if len(last) < len(reports) else []


def summary(reports: Sequence[Report], world_size: int, folder: Path) -> str:
    """Summary for the user, in a few lines. `reports`: rank 0's, and those of other ranks that came."""
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
        lines.append("behind: no rank more than the others; compare their stacks")
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


def _name(step: int, number: int = 1) -> str:
    return f"{step:08d}" + (f"-{number}" if number > 1 else "")


def _rank_name(rank: int) -> str:
    return f"rank-{rank:05d}"


def _made(folder: Path) -> bool:
    """Make a folder; False if it exists."""
    try:
        folder.mkdir()
    except FileExistsError:
        return False
    return True


def _listed(folder: Path) -> list[str]:
    """Names in a folder; none where it cannot be listed."""
    with suppress(OSError):
        return os.listdir(folder)
    return []


def _read(path: Path) -> Report | None:
    """The report in a file; None where it is incomplete or of another version."""
    try:
        return Report(**read_json(path, _LARGEST_REPORT))
    except (OSError, ValueError, TypeError):
        return None


def _replace(path: Path, text: str) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _wait_until(holds: Callable[[], bool], pause_s: float) -> None:
    """Poll now, after `pause_s`, and then ever more seldom, for COLLECT_S at most."""
    until = time.monotonic() + COLLECT_S
    while not holds() and (left := until - time.monotonic()) > 0:
        time.sleep(min(pause_s, left))
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
