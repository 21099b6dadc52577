"""torchrun, with six things it lacks: a signal to it reaches the workers as a request, the workers' exit code
becomes its own, a rank that fails ends the other nodes too, a supervisor that hangs ends the run, under srun
it knows which node it is on, and nodes meet also if --master-port is taken.

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
from contextlib import contextmanager

from torch.distributed import DistStoreError, TCPStore
from torch.distributed import run as torch_run
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from llama_mcore.distributed.rendezvous import LIMIT_S
from llama_mcore.distributed.store import store_port
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
from llama_mcore.launch.nodes import LEAVE_LIMIT, Nodes
from llama_mcore.watchdog.signals import ECHO_S, STOP_SIGNALS
from llama_mcore.watchdog.signs import Signs
from llama_mcore.watchdog.workers import end_workers, send, workers

_POLL_S = 0.5


def run(args: Sequence[str]) -> int:
    """Run torchrun with these arguments and return the first failed worker's exit code, 0 if none failed; of
    several nodes, that of the node where one failed first."""
    settings = parsed(args)
    with report_errors():
        _check(settings)
    _default_threads(settings.nproc_per_node)
    _silence_agent()
    # Held, and so held in the workers too until these are ready: a signal kills nobody who is just starting.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    threading.Thread(target=_forward, name="signals", daemon=True).start()
    with report_errors(), Signs() as signs, _meeting(settings) as nodes:
        return _launch(settings, nodes, signs)


def _launch(settings: Namespace, nodes: Nodes, signs: Signs) -> int:
    try:
        torch_run.run(settings)
    except ChildFailedError as error:
        if nodes.failed_elsewhere is not None:
            return nodes.failed_elsewhere
        rank, failure = error.get_first_failure()
        exit_code = EXIT_SAVED if signs.ended else _exit_code(rank, failure.exitcode)
        nodes.tell(exit_code)
        return exit_code
    except DistStoreError as error:
        reason = f"not all came ({error})"
        remedy = "see in the output above what became of the others, or why they cannot reach this one"
        raise PreflightError(Problem("--nnodes", settings.nnodes, reason, remedy)) from None
    return 0


def parsed(args: Sequence[str]) -> Namespace:
    """torchrun's arguments; under srun the node's number in the job is the default of --node-rank."""
    node = os.environ.get("PET_NODE_RANK") or os.environ.get("SLURM_NODEID", "0")
    settings = torch_run.parse_args(["--node-rank", node, *args])
    settings.signals_to_handle = "SIGHUP,SIGQUIT"
    if (settings.redirects, settings.tee, settings.local_ranks_filter) == ("0", "0", ""):
        settings.log_dir = settings.log_dir or os.devnull  # else an empty folder stays for each start
    return settings


def _check(settings: Namespace) -> None:
    """Raises ConfigError for numbers that torchrun would answer with a traceback."""
    problems = []
    if not re.fullmatch(r"[1-9]\d{0,5}(:[1-9]\d{0,5})?", settings.nnodes):
        problems.append(
            Problem("--nnodes", settings.nnodes, "must be a number of nodes, or MIN:MAX", "e.g. 2")
        )
    if not re.fullmatch(r"[1-9]\d{0,4}|auto|cpu|gpu|xpu", settings.nproc_per_node):
        reason = "must be a number of processes from 1 on, or auto, cpu or gpu"
        problems.append(Problem("--nproc-per-node", settings.nproc_per_node, reason, "e.g. 8"))
    if problems:
        raise ConfigError(problems)


@contextmanager
def _meeting(settings: Namespace) -> Iterator[Nodes]:
    """Where a port was given for several nodes to meet at: have them meet also if it is taken.

    Without one, torchrun lets the system choose it for a single node.
    """
    if settings.rdzv_backend != "static" or settings.rdzv_endpoint or settings.master_port is None:
        yield Nodes(None)
        return
    is_host = settings.node_rank == 0
    settings.rdzv_conf = settings.rdzv_conf or f"timeout={LIMIT_S:.0f}"
    with store_port(settings.master_addr, settings.master_port, settings.rdzv_id, is_host=is_host) as port:
        settings.master_port = port
        count = int(settings.nnodes.partition(":")[0])
        store = TCPStore(settings.master_addr, port, timeout=LEAVE_LIMIT) if count > 1 else None
        with Nodes(store, count, is_host=is_host) as nodes:
            yield nodes


def _silence_agent() -> None:
    """What a worker had to say it has said: torchrun repeats it in 20 lines, and takes 40 for another
    node that was done first. Its loggers have levels of their own."""
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)


def _forward() -> None:
    """Pass every request to stop on to the workers; before there are any, leave: nothing is to be saved.

    A node may wait for the others for long before it starts its workers. TERM goes on as USR1: a worker takes
    torchrun's own TERM for the end of another worker. A second request ends workers that do not obey it.
    """
    got = None
    while not (got or workers()):
        got = signal.sigtimedwait(STOP_SIGNALS, _POLL_S)
    if got and not workers():
        os._exit(EXIT_SAVED)
    first: float | None = None
    while True:
        got = got or signal.sigwaitinfo(STOP_SIGNALS)
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
