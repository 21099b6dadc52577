"""torchrun, with six things that it lacks:

- a signal to it reaches the workers as a stop request,
- the workers' exit code becomes its own,
- a rank that fails ends the other nodes too,
- a supervisor that hangs ends the run,
- under srun it knows which node it is on,
- nodes find each other even if --master-port is taken.

Plain torchrun answers SIGTERM by stopping the workers and raising, and any failure by exit code 1, so that a
scheduler cannot tell "saved, start me again" (75) from a crash.
"""

import logging
import os
import re
import signal
import threading
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from types import TracebackType
from typing import Self

from torch.distributed import DistError, DistStoreError, TCPStore
from torch.distributed import run as torch_run
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from llama_mcore.distributed.rendezvous import LIMIT_S, store_port
from llama_mcore.errors import (
    EXIT_SAVED,
    EXIT_SOFTWARE,
    ConfigError,
    LlamaMcoreError,
    PreflightError,
    Problem,
    report_errors,
    say,
)
from llama_mcore.watchdog.liveness import LivenessMonitor, end_workers, send, workers
from llama_mcore.watchdog.signals import ECHO_S, STOP_SIGNALS

_POLL_S = 0.5
_NODES_POLL_S = 1.0
AGENT_ENDS_S = 20.0
"""torchrun's time to find that its workers have ended; it may wait for other nodes instead."""
_LEAVE_LIMIT = timedelta(seconds=10)
_LEAVE_POLL_S = 0.05
_LEFT, _FAILED = "llama_mcore/left", "llama_mcore/failed"


def run(args: Sequence[str]) -> int:
    """Run torchrun with these arguments and return the exit code of the worker that failed first on any node,
    0 if none failed."""
    settings = parsed(args)
    with report_errors():
        _check(settings)
    _default_threads(settings.nproc_per_node)
    _silence_agent()
    # Held, and so held in the workers too until these are ready: a signal kills no process that is starting.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    threading.Thread(target=_forward_signals, name="signals", daemon=True).start()
    with report_errors(), LivenessMonitor() as monitor, _rendezvous(settings) as nodes:
        return _launch(settings, nodes, monitor)


def _launch(settings: Namespace, nodes: "Nodes", monitor: LivenessMonitor) -> int:
    try:
        torch_run.run(settings)
    except ChildFailedError as error:
        if nodes.failed_elsewhere is not None:
            return nodes.failed_elsewhere
        rank, failure = error.get_first_failure()
        exit_code = EXIT_SAVED if monitor.has_killed else _exit_code(rank, failure.exitcode)
        nodes.report_failure(exit_code)
        return exit_code
    except DistStoreError as error:
        reason = f"not all nodes joined ({error})"
        remedy = "look above for errors of the others, and check that they can reach this node"
        raise PreflightError(Problem("--nnodes", settings.nnodes, reason, remedy)) from None
    return 0


def parsed(args: Sequence[str]) -> Namespace:
    """torchrun's own namespace of its arguments; under srun --node-rank defaults to the node's number in the
    job."""
    node = os.environ.get("PET_NODE_RANK") or os.environ.get("SLURM_NODEID", "0")
    settings = torch_run.parse_args(["--node-rank", node, *args])
    settings.signals_to_handle = "SIGHUP,SIGQUIT"
    if (settings.redirects, settings.tee, settings.local_ranks_filter) == ("0", "0", ""):
        settings.log_dir = settings.log_dir or os.devnull  # else each start leaves an empty folder
    return settings


def _check(settings: Namespace) -> None:
    """Check the numbers that torchrun would answer with a traceback. Raises ConfigError."""
    problems = []
    if not re.fullmatch(r"[1-9]\d{0,5}(:[1-9]\d{0,5})?", settings.nnodes):
        problems.append(
            Problem("--nnodes", settings.nnodes, "must be a number of nodes, or MIN:MAX", "e.g. 2")
        )
    if not re.fullmatch(r"[1-9]\d{0,4}|auto|cpu|gpu|xpu", settings.nproc_per_node):
        reason = "must be a number of processes, at least 1, or auto, cpu or gpu"
        problems.append(Problem("--nproc-per-node", settings.nproc_per_node, reason, "e.g. 8"))
    if problems:
        raise ConfigError(problems)


@contextmanager
def _rendezvous(settings: Namespace) -> Iterator["Nodes"]:
    """Rendezvous of the nodes where a port was given for it, even if that port is taken.

    Without a port, torchrun lets the system choose one for a single node.
    """
    if settings.rdzv_backend != "static" or settings.rdzv_endpoint or settings.master_port is None:
        yield Nodes(None)
        return
    is_host = settings.node_rank == 0
    settings.rdzv_conf = settings.rdzv_conf or f"timeout={LIMIT_S:.0f}"
    with store_port(settings.master_addr, settings.master_port, settings.rdzv_id, is_host=is_host) as port:
        settings.master_port = port
        count = int(settings.nnodes.partition(":")[0])
        store = TCPStore(settings.master_addr, port, timeout=_LEAVE_LIMIT) if count > 1 else None
        with Nodes(store, count, is_host=is_host) as nodes:
            yield nodes


def _silence_agent() -> None:
    """Silence torchrun's agent, whose loggers have levels of their own."""
    # it repeats what a worker has printed in 20 lines, and takes 40 for another node that was done first
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)


def _forward_signals() -> None:
    """Pass every stop request on to the workers; before there are any, exit, as there is nothing to save.

    A node may wait for the others for long before it starts its workers. A second request ends workers that
    do not obey it.
    """
    got = None
    while not (got or workers()):
        got = signal.sigtimedwait(STOP_SIGNALS, _POLL_S)
    if got and not workers():
        os._exit(EXIT_SAVED)
    first: float | None = None
    while True:
        got = got or signal.sigwaitinfo(STOP_SIGNALS)
        # A worker takes torchrun's own TERM for the end of another worker.
        number, now = signal.SIGUSR1 if got.si_signo == signal.SIGTERM else got.si_signo, time.monotonic()
        if first is None or now - first <= ECHO_S:
            first = first or now
            send(number)
        else:
            end_workers(number)
        got = None


def _default_threads(processes: str) -> None:
    """Share the machine's cores among the workers; torchrun would give each a single thread."""
    if processes.isdigit():
        cores = len(os.sched_getaffinity(0))
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // int(processes))))


def _exit_code(rank: int, code: int) -> int:
    explained = {EXIT_SAVED, EXIT_SOFTWARE, *(error.exit_code for error in LlamaMcoreError.__subclasses__())}
    if code not in explained:
        say(f"rank {rank} failed with exit code {code}")
    # a worker killed by signal n has code -n; shells say 128 + n
    return code if code >= 0 else 128 - code


class Nodes:
    """Line from the launcher of one node to those of the others: where a rank has failed, all end.

    Without it, a node learns of another's end only when its ranks notice, which those that wait in a
    collective of NCCL do not; srun then kills what is left, with an exit code that does not tell the cause.

    It goes through the job's store, which torchrun on the first node serves. That node leaves last, since
    others may still wait for an answer. A store that stops answering does not end the job: the workers have
    connections of their own.
    """

    def __init__(self, store: TCPStore | None, count: int = 1, *, is_host: bool = True) -> None:
        """`store`: None for a single node."""
        self._store, self._others, self._is_host = store, count - 1, is_host
        self._over = threading.Event()
        self.failed_elsewhere: int | None = None
        """Exit code of another node that failed before this one."""

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

    def report_failure(self, exit_code: int) -> None:
        """Tell the others that a rank of this node has failed."""
        self._over.set()
        if self._store:
            with suppress(DistError, RuntimeError):
                self._store.set(_FAILED, str(exit_code))

    def _watch(self, store: TCPStore) -> None:
        with suppress(DistError, RuntimeError):
            while not self._over.wait(_NODES_POLL_S):
                if store.check([_FAILED]):
                    self.failed_elsewhere = int(store.get(_FAILED))
                    end_workers(signal.SIGTERM)
                    time.sleep(AGENT_ENDS_S)
                    os._exit(self.failed_elsewhere)

    def _leave(self, store: TCPStore) -> None:
        left = store.add(_LEFT, int(not self._is_host))
        until = time.monotonic() + _LEAVE_LIMIT.total_seconds()
        while self._is_host and left < self._others and time.monotonic() < until:
            time.sleep(_LEAVE_POLL_S)
            left = store.add(_LEFT, 0)
