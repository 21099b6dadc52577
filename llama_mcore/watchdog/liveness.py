"""Liveness of the supervisors of a host, which our torchrun watches: nothing else does.

A file in memory without a name, a record for each local rank, which workers open by the path that the
launcher gives them (OUR_TORCHRUN). A record holds the process number and the monotonic time, which all
processes of a host share and no clock that is set moves.
"""

import os
import signal
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from struct import Struct
from types import TracebackType
from typing import Self

import psutil

from llama_mcore.distributed.launch_env import OUR_TORCHRUN, rank_info
from llama_mcore.errors import say

ALIVE_S = 1.0
"""Seconds between records, and between two checks of them."""
SILENT_S = 30.0
"""A supervisor that writes no record for so long is stopped or hangs, whatever the run's own timeouts are."""
WORKERS_END_S = 30.0
"""The time that torchrun itself waits before it kills."""
_PAUSED_S = 10.0
"""A longer gap between two checks: the launcher did not run either, as while a job is suspended."""
_POLL_S = 0.1
_RECORD = Struct("<qd")


def report_alive(variables: Mapping[str, str] = os.environ) -> None:
    """Record from now on, in a thread, that this process runs; under other launchers nobody would read it."""
    path, local_rank = variables.get(OUR_TORCHRUN, ""), rank_info(variables).local_rank

    def report() -> None:
        with suppress(OSError):
            file = os.open(path, os.O_WRONLY)
            while True:
                record = _RECORD.pack(os.getpid(), time.monotonic())
                os.pwrite(file, record, local_rank * _RECORD.size)
                time.sleep(ALIVE_S)

    if path:
        threading.Thread(target=report, name="alive", daemon=True).start()


class LivenessMonitor:
    """Watch over the supervisors while the context lasts: one that falls silent is killed, and its training
    process dies with it."""

    def __init__(self) -> None:
        self._over = threading.Event()
        self.has_killed = False

    def __enter__(self) -> Self:
        self._file = os.memfd_create("supervisors")
        os.environ[OUR_TORCHRUN] = f"/proc/{os.getpid()}/fd/{self._file}"
        threading.Thread(target=self._watch, name="supervisors", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()

    def _watch(self) -> None:
        checked = awake_since = time.monotonic()
        while not self._over.wait(ALIVE_S):
            now = time.monotonic()
            awake_since, checked = now if now - checked > _PAUSED_S else awake_since, now
            records = os.pread(self._file, os.fstat(self._file).st_size, 0)
            for local_rank, (pid, alive_at) in enumerate(_RECORD.iter_unpack(records)):
                silent_s = now - max(alive_at, awake_since)
                if silent_s > SILENT_S and pid in [worker.pid for worker in workers()]:
                    self._kill(local_rank, pid, silent_s)

    def _kill(self, local_rank: int, pid: int, silent_s: float) -> None:
        self.has_killed = True
        say(
            f"the supervisor of local rank {local_rank} (process {pid}) has shown no sign of life for "
            f"{silent_s:.0f} s: ending the run; start the same command again to continue it"
        )
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def workers() -> list[psutil.Process]:
    """Processes that torchrun has started here and that have not ended."""
    found = []
    for worker in psutil.Process().children():
        with suppress(psutil.NoSuchProcess):
            # a status, since to wait for a worker would take its exit code away from torchrun
            if worker.status() != psutil.STATUS_ZOMBIE:
                found.append(worker)
    return found


def send(number: int) -> None:
    """Send a signal to all workers."""
    for worker in workers():
        with suppress(psutil.NoSuchProcess):
            worker.send_signal(number)


def end_workers(number: int) -> None:
    """Send a signal to all workers, and SIGKILL to those that it has not ended in time."""
    send(number)
    until = time.monotonic() + WORKERS_END_S
    while workers():
        if time.monotonic() > until:
            send(signal.SIGKILL)
            return
        time.sleep(_POLL_S)
