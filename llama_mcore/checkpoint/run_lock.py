"""Run lock: a lease with a fencing number, so that one job at a time writes to a run's folder.

    RUN_DIR/lease/00000003.json             held: its file is touched every few seconds
    RUN_DIR/lease/00000002.released.json    released, or taken over because its holder had died

The highest number holds the run, and is the number of the attempt. A job takes over by creating the next
file, which only one of several can do, even on a network file system. A holder that was wrongly thought dead
finds the higher number before it adds a line or publishes a checkpoint, and stops.
"""

import fcntl
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

from llama_mcore.errors import PreflightError, Problem
from llama_mcore.observe.metrics_file import METRICS_FILE, last_attempt
from llama_mcore.small_file import read_json

FOLDER = "lease"
BEAT_S = 10.0
STALE_S = 60.0
"""Seconds without a touch of its file after which a holder on another host is dead."""
_RELEASED = ".released.json"
_LARGEST = 4096


@dataclass(frozen=True)
class Holder:
    """Identity of a process that holds a lease, safe against changed clocks and reused pids."""

    host: str
    pid: int
    boot: str
    """Boot id of its kernel: host names may be shared, and a reboot ends all processes."""
    namespace: str
    """Namespace of the pid: a container has its own."""
    ticks: int
    """Start time of its process, in clock ticks since the boot."""
    job: str
    """SLURM_JOB_ID, if any; a job that was requeued is the only one with that id."""


def _myself() -> Holder:
    return Holder(
        host=socket.gethostname(),
        pid=os.getpid(),
        boot=Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        namespace=os.readlink("/proc/self/ns/pid"),
        ticks=_start_ticks(os.getpid()) or 0,
        job=os.environ.get("SLURM_JOB_ID", ""),
    )


def _start_ticks(pid: int) -> int | None:
    """Start time of a process (proc(5), stat, field 22); None if it has ended, also as a zombie."""
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if after_name[0] == "Z" else int(after_name[19])


@dataclass(frozen=True)
class Lease:
    path: Path
    number: int
    lock: int
    """File descriptor whose lock the kernel holds while this process lives."""

    def check(self) -> None:
        """Raise OSError if another job has taken the run over. Cheap enough for every step."""
        # only the next number is looked for, however many attempts there were
        following = f"{self.number + 1:08d}"
        names = (f"{following}.json", f"{following}{_RELEASED}")
        if not self.path.exists() or any(self.path.with_name(name).exists() for name in names):
            newest = _newest(self.path.parent)
            holder = f" by {_describe(_holder(newest[1]))}" if newest else ""
            raise OSError(0, f"the run was taken over{holder}, and this job must no longer write to it")


def was_taken_over(run_dir: Path, pid: int) -> bool:
    """True if another job has held the run since process `pid` of this machine did."""
    newest, me = _newest(run_dir / FOLDER), _myself()
    if newest is None:
        return False
    holder = _holder(newest[1])
    mine = (me.boot, me.namespace, pid)
    return holder is None or (holder.boot, holder.namespace, holder.pid) != mine


@contextmanager
def held_lease(run_dir: Path) -> Iterator[Lease]:
    """Hold the run in `run_dir` while the block runs.

    Raises PreflightError where another job holds it, after a wait of up to `STALE_S` to see whether a holder
    on another host is alive; OSError where the folder cannot be written. A new folder is removed at the end
    if it holds nothing but the lease.
    """
    folder = run_dir / FOLDER
    # If the leases were deleted, the metrics of earlier attempts still have their numbers.
    before = 0 if _newest(folder) else last_attempt(run_dir / METRICS_FILE)
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    lease = _acquire(folder, before)
    ended = threading.Event()
    beating = threading.Thread(target=_beat, args=(lease.path, ended), name="lease", daemon=True)
    beating.start()
    try:
        yield lease
    finally:
        ended.set()
        beating.join()
        _release(lease, created)


def _acquire(folder: Path, before: int) -> Lease:
    newest = _newest(folder)
    if newest and not newest[1].name.endswith(_RELEASED):
        _wait_until_dead(newest[1])
    number = 1 + (newest[0] if newest else before)
    path = folder / f"{number:08d}.json"
    content = json.dumps(asdict(_myself())).encode()
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError:
        raise _refusal(path, _holder(path)) from None
    with suppress(OSError):  # a file system without locks
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.write(file, content)
    return Lease(path, number, file)


def check_free(run_dir: Path) -> None:
    """Raise PreflightError where another job holds the run now. Takes no lease and does not wait: a holder on
    another host counts as alive until it has not touched its file for `STALE_S`."""
    newest = _newest(run_dir / FOLDER)
    if newest is None or newest[1].name.endswith(_RELEASED):
        return
    path, holder = newest[1], _holder(newest[1])
    alive = _is_alive(path, holder)
    with suppress(OSError):  # the folder cannot be written, which other checks report
        if alive or (alive is None and _silent_s(path) < STALE_S):
            raise _refusal(path, holder)


def _wait_until_dead(path: Path) -> None:
    """Return when the holder is known to be dead. Raises PreflightError when it is known to be alive."""
    holder = _holder(path)
    alive = _is_alive(path, holder)
    if alive:
        raise _refusal(path, holder)
    seen = _touched(path)
    until = time.monotonic() + STALE_S - _silent_s(path)
    while alive is None and time.monotonic() < until:
        time.sleep(min(1.0, BEAT_S))
        if _touched(path) != seen:
            raise _refusal(path, holder)


def _is_alive(path: Path, holder: Holder | None) -> bool | None:
    """True if the holder lives; None where that cannot be known from here."""
    if _is_locked(path):
        return True
    if holder is None:
        return False
    me = _myself()
    if (holder.boot, holder.namespace) == (me.boot, me.namespace):
        return _start_ticks(holder.pid) == holder.ticks
    # a job that was requeued and began on another node is dead on the first
    moved = holder.job and holder.job == me.job and holder.host != me.host
    return False if moved else None


def _is_locked(path: Path) -> bool:
    """True if the holder's lock is held. If not, the file system may have no locks, or none across hosts."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        # shared, so that two processes that check do not take each other for the holder
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(file)
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
    """The process that wrote a lease; None if it died before that was done."""
    try:
        return Holder(**read_json(path, _LARGEST))
    except (OSError, ValueError, TypeError):
        return None


def _newest(folder: Path) -> tuple[int, Path] | None:
    numbered = [
        (int(path.name[:8]), path) for path in folder.glob("[0-9]*.json") if path.name[:8].isdecimal()
    ]
    return max(numbered, default=None)


def _touched(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _silent_s(path: Path) -> float:
    """Seconds since a holder touched its file. Raises OSError."""
    # by the file server's clock, which a new file tells: a node's clock may be minutes off
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
    os.close(lease.lock)
