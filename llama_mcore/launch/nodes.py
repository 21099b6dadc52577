"""What the launchers of a job's nodes tell each other: that a rank has failed, so that all of them end.

Without it, a node learns of another's end only when its ranks notice, which those that wait in a collective
of NCCL do not; srun then kills what is left, with an exit code that says nothing of the cause.
"""

import os
import signal
import threading
import time
from contextlib import suppress
from datetime import timedelta
from types import TracebackType
from typing import Self

from torch.distributed import DistError, TCPStore

from llama_mcore.watchdog.workers import end_workers

POLL_S = 1.0
AGENT_ENDS_S = 20.0
"""What torchrun has to find that its workers have ended; it may wait for other nodes instead."""
LEAVE_LIMIT = timedelta(seconds=10)
_LEAVE_POLL_S = 0.05
_LEFT, _FAILED = "llama_mcore/left", "llama_mcore/failed"


class Nodes:
    """One launcher's line to the others, through the job's store, which torchrun on the first node serves.

    The first node leaves last: others may still wait for an answer of the store. One that does not answer any
    more is no end of the job: the workers have connections of their own.
    """

    def __init__(self, store: TCPStore | None, count: int = 1, *, is_host: bool = True) -> None:
        """`store`: None for one node, which has nobody to tell."""
        self._store, self._others, self._is_host = store, count - 1, is_host
        self._over = threading.Event()
        self.failed_elsewhere: int | None = None
        """Exit code of another node, where that failed before this one."""

    def __enter__(self) -> Self:
        if self._store:
            threading.Thread(target=self._watch, args=(self._store,), name="nodes", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        if self._store and error is None:
            with suppress(DistError, RuntimeError):
                self._leave(self._store)

    def tell(self, exit_code: int) -> None:
        """A rank of this node has failed."""
        self._over.set()
        if self._store:
            with suppress(DistError, RuntimeError):
                self._store.set(_FAILED, str(exit_code))

    def _watch(self, store: TCPStore) -> None:
        with suppress(DistError, RuntimeError):
            while not self._over.wait(POLL_S):
                if store.check([_FAILED]):
                    self.failed_elsewhere = int(store.get(_FAILED))
                    end_workers(signal.SIGTERM)
                    time.sleep(AGENT_ENDS_S)
                    os._exit(self.failed_elsewhere)

    def _leave(self, store: TCPStore) -> None:
        left = store.add(_LEFT, int(not self._is_host))
        until = time.monotonic() + LEAVE_LIMIT.total_seconds()
        while self._is_host and left < self._others and time.monotonic() < until:
            time.sleep(_LEAVE_POLL_S)
            left = store.add(_LEFT, 0)
