"""Signs of life of the supervisors of a host, at which our torchrun looks: nothing else watches them.

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

from llama_mcore.distributed.launch_env import OUR_TORCHRUN, rank_info
from llama_mcore.errors import say
from llama_mcore.watchdog.workers import workers

SIGN_S = 1.0
SILENT_S = 30.0
"""Without a sign for so long a supervisor is stopped or hangs, whatever its run allows for."""
_PAUSED_S = 10.0
"""Between two looks: then the launcher did not run either, as while a job is suspended."""
_RECORD = Struct("<qd")


def show_signs(variables: Mapping[str, str] = os.environ) -> None:
    """Show this process's from now on, in a thread; under another launcher nobody looks."""
    path, local_rank = variables.get(OUR_TORCHRUN, ""), rank_info(variables).local_rank

    def show() -> None:
        with suppress(OSError):
            file = os.open(path, os.O_WRONLY)
            while True:
                sign = _RECORD.pack(os.getpid(), time.monotonic())
                os.pwrite(file, sign, local_rank * _RECORD.size)
                time.sleep(SIGN_S)

    if path:
        threading.Thread(target=show, name="signs", daemon=True).start()


class Signs:
    """Looks at them while the context lasts, and kills a supervisor that shows none any more: the process
    that trains dies with it."""

    def __init__(self) -> None:
        self._over = threading.Event()
        self.ended = False
        """One was killed."""

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
        looked = awake_since = time.monotonic()
        while not self._over.wait(SIGN_S):
            now = time.monotonic()
            awake_since, looked = now if now - looked > _PAUSED_S else awake_since, now
            records = os.pread(self._file, os.fstat(self._file).st_size, 0)
            for local_rank, (pid, shown) in enumerate(_RECORD.iter_unpack(records)):
                silent_s = now - max(shown, awake_since)
                if silent_s > SILENT_S and pid in [worker.pid for worker in workers()]:
                    self._end(local_rank, pid, silent_s)

    def _end(self, local_rank: int, pid: int, silent_s: float) -> None:
        self.ended = True
        say(
            f"the supervisor of local rank {local_rank} (process {pid}) has shown no sign of life for "
            f"{silent_s:.0f} s: ending the run; the same command goes on"
        )
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
