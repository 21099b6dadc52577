"""One job at a time writes a run: a lease with a fencing number.

    RUN_DIR/lease/00000003.json             held: its file is touched every few seconds
    RUN_DIR/lease/00000002.released.json    given back, or taken over as its holder had died

The highest number holds the run. A job takes it over by creating the next file, which only one of several can
do, also on a network file system. A holder that was thought dead finds the higher number before it publishes
a checkpoint, and stops.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryFile

import psutil

from llama_mcore.errors import PreflightError, Problem

FOLDER = "lease"
BEAT_S = 10.0
STALE_S = 60.0
"""A holder on another host that has not touched its file for so long is dead."""
_RELEASED = ".released.json"


@dataclass(frozen=True)
class Holder:
    host: str
    pid: int
    started: float
    """When its process began, in seconds since 1970: a number is not enough to know a process."""
    job: str
    """SLURM_JOB_ID, if any: a job that runs again is the only one of that number."""


@dataclass(frozen=True)
class Lease:
    path: Path
    number: int

    def check(self) -> None:
        """Raise OSError if another job has taken the run over."""
        newest = _newest(self.path.parent)
        if newest is None or newest[0] != self.number or not self.path.exists():
            holder = f" by {_describe(_holder(newest[1]))}" if newest else ""
            raise OSError(0, f"the run was taken over{holder}, and this job may not write to it any more")


@contextmanager
def held_lease(run_dir: Path) -> Iterator[Lease]:
    """Hold the run in `run_dir` while the block runs.

    Raises PreflightError where another job holds it; waits up to `STALE_S` to see whether a holder on another
    host is alive. A folder that held nothing but the lease is removed again. Raises OSError where the folder
    cannot be written.
    """
    folder = run_dir / FOLDER
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    lease = _acquire(folder)
    ended = threading.Event()
    beating = threading.Thread(target=_beat, args=(lease.path, ended), name="lease", daemon=True)
    beating.start()
    try:
        yield lease
    finally:
        ended.set()
        beating.join()
        _release(lease, created)


def _acquire(folder: Path) -> Lease:
    newest = _newest(folder)
    if newest and not newest[1].name.endswith(_RELEASED):
        _wait_until_dead(newest[1])
    number = newest[0] + 1 if newest else 1
    path = folder / f"{number:08d}.json"
    me = psutil.Process()
    holder = Holder(socket.gethostname(), me.pid, me.create_time(), os.environ.get("SLURM_JOB_ID", ""))
    try:
        with path.open("x", encoding="utf-8") as file:
            json.dump(asdict(holder), file)
    except FileExistsError:
        raise _refusal(path, _holder(path)) from None
    return Lease(path, number)


def check_free(run_dir: Path) -> None:
    """Raise PreflightError where another job holds the run now. Takes no lease, and does not wait: a holder
    on another host counts as alive until it has not touched its file for `STALE_S`."""
    newest = _newest(run_dir / FOLDER)
    if newest is None or newest[1].name.endswith(_RELEASED):
        return
    path, holder = newest[1], _holder(newest[1])
    alive = _is_alive(holder)
    with suppress(OSError):  # where nothing can be written, which every rank finds
        if alive or (alive is None and _silent_s(path) < STALE_S):
            raise _refusal(path, holder)


def _wait_until_dead(path: Path) -> None:
    """Return when the holder is known to be dead. Raises PreflightError when it is known to be alive."""
    holder = _holder(path)
    alive = _is_alive(holder)
    if alive:
        raise _refusal(path, holder)
    seen = _touched(path)
    until = time.monotonic() + STALE_S - _silent_s(path)
    while alive is None and time.monotonic() < until:
        time.sleep(min(1.0, BEAT_S))
        if _touched(path) != seen:
            raise _refusal(path, holder)


def _is_alive(holder: Holder | None) -> bool | None:
    """None where that cannot be known from here."""
    if holder is None:
        return False
    if holder.host != socket.gethostname():
        # A job that was put back into the queue, and began on another node, is dead where it was.
        same_job = holder.job and holder.job == os.environ.get("SLURM_JOB_ID")
        return False if same_job else None
    try:
        process = psutil.Process(holder.pid)
        ended = process.status() == psutil.STATUS_ZOMBIE  # and its parent has not asked for its exit code
        return not ended and abs(process.create_time() - holder.started) < 1
    except psutil.Error:
        return False


def _refusal(path: Path, holder: Holder | None) -> PreflightError:
    return PreflightError(
        Problem(
            "run.dir",
            path.parent.parent,
            f"is in use by {_describe(holder)}",
            "stop that job, wait for it, or choose another folder",
        )
    )


def _describe(holder: Holder | None) -> str:
    if holder is None:
        return "another job"
    job = f", job {holder.job}" if holder.job else ""
    return f"process {holder.pid} on {holder.host}{job}"


def _holder(path: Path) -> Holder | None:
    """Who wrote a lease; None if it died while it did."""
    try:
        return Holder(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _newest(folder: Path) -> tuple[int, Path] | None:
    numbered = [(int(path.name[:8]), path) for path in folder.glob("[0-9]*.json") if path.name[:8].isdigit()]
    return max(numbered, default=None)


def _touched(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _silent_s(path: Path) -> float:
    """Seconds since a holder touched its file, by the file server's clock, which a file touched now tells: by
    that of a node that is minutes off, a live holder would look dead. Raises OSError."""
    with TemporaryFile(dir=path.parent) as probe:
        os.utime(probe.fileno())
        return max(0.0, os.fstat(probe.fileno()).st_mtime - _touched(path))


def _beat(path: Path, ended: threading.Event) -> None:
    while not ended.wait(BEAT_S):
        with suppress(OSError):
            os.utime(path)


def _release(lease: Lease, created: list[Path]) -> None:
    with suppress(OSError):
        nothing_else = all(path.name == FOLDER for path in lease.path.parent.parent.iterdir())
        if nothing_else and created:
            lease.path.unlink()
            for path in created:
                path.rmdir()
        else:
            lease.path.rename(lease.path.with_name(f"{lease.number:08d}{_RELEASED}"))
