"""Worlds of ranks: functions of a test run in forked processes, on the CPU, over gloo.

A test of two ranks:

    def total() -> float:
        with process_groups(ParallelConfig(tp=2), seed=0) as groups:
            value = torch.tensor(groups.rank + 1.0)
            dist.all_reduce(value, group=groups.tp_group)
            return value.item()

    @pytest.mark.process
    def test_a_sum_over_two_ranks() -> None:
        assert run_ranks(2, total) == [3.0, 3.0]

A fork server, one for each of pytest's processes, has imported torch, megatron-core and DeepSpeed
(libraries.py). It forks a host for each call, and the host forks the ranks: what a test hands over is a
function of a module, by name, and what a host does may be a closure. The host leads a session of its own, and
whatever is left of that when it has ended is killed.
"""

import faulthandler
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from multiprocessing import connection, forkserver
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest.mock import patch

from llama_mcore.watchdog.supervisor import die_with_parent

ROOT = Path(__file__).parents[2]
PYTHONPATH = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
"""Of processes that tests start: the packages may come that way too."""
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
"""Ranks share the cores of the machine, and OpenBLAS would start threads when it is imported."""
SERVER = ONE_THREAD | {
    "DS_ACCELERATOR": "cpu",  # else importing DeepSpeed asks torch for GPUs, which poisons every fork
    "TORCHINDUCTOR_COMPILE_THREADS": "1",  # else Inductor starts a pool of processes
    "PYTHONPATH": PYTHONPATH,
}
TIMEOUT_S = 600.0
"""Ends what hangs; no test is about how long something takes."""
_STACKS_S, _LOOK_S = 2.0, 0.01
_SHOWN = 8000
_in_host = False


def run_ranks(
    world_size: int,
    function: Callable[..., Any],
    *args: Any,
    timeout_s: float = TIMEOUT_S,
    spawn: bool = False,
) -> list[Any]:
    """Results of `function(*args)` on each rank of a job of `world_size`, in rank order.

    `spawn`: in new interpreters, for tests marked `gpu`, since CUDA does not survive a fork.
    Raises AssertionError with what was printed if a rank fails or has not ended after `timeout_s`.
    """
    if spawn:
        return _results_of_ranks("spawn", world_size, function, args, timeout_s)
    return call(_results_of_ranks, "fork", world_size, function, args, timeout_s, timeout_s=2 * timeout_s)


def exit_codes_of(
    world_size: int, function: Callable[..., Any], *args: Any, timeout_s: float = TIMEOUT_S
) -> list[int]:
    """Exit codes of ranks that may fail; negative: by which signal."""
    return call(_exit_codes_of_ranks, world_size, function, args, timeout_s, timeout_s=2 * timeout_s)


def call(function: Callable[..., Any], *args: Any, timeout_s: float = TIMEOUT_S) -> Any:
    """Result of `function(*args)` in a process of its own, which has one thread and no process group.

    Raises AssertionError with what it printed if it fails or has not ended after `timeout_s`.
    """
    return function(*args) if _in_host else Call(function, *args).result(timeout_s)


class Call:
    """A function at work in a process of its own, forked from the server."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        sys.audit("world.Call", function)  # forks without one of the interpreter's own events
        context = _fork_server()
        self._name = _name(function)
        self._output = tempfile.NamedTemporaryFile(prefix="world-")  # noqa: SIM115
        self._results, results = context.Pipe(duplex=False)
        self._process = context.Process(
            target=_host_main, args=(Path(self._output.name), results, function, args)
        )
        self._process.start()
        results.close()
        # also where a test fails before it has asked for the result
        self._kill = weakref.finalize(self, _kill_session, self._process)

    @property
    def pid(self) -> int:
        assert self._process.pid
        return self._process.pid

    @property
    def output(self) -> str:
        """Output so far of the process and its children."""
        return Path(self._output.name).read_text(errors="replace")

    def is_alive(self) -> bool:
        return self._process.is_alive()

    def result(self, timeout_s: float = TIMEOUT_S) -> Any:
        """Wait for the end. Raises AssertionError as `call` does."""
        (ended,) = _wait([self._process], [self._results], timeout_s)
        self._kill()
        if ended.exit_code:
            raise AssertionError(f"{self._name} {ended.fate}:\n{self.output[-_SHOWN:]}")
        return ended.result


def write_output_to(path: Path) -> None:
    """Let everything that this process prints from now on go to the end of a file."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number, stream in ((1, sys.stdout), (2, sys.stderr)):
        stream.flush()
        os.dup2(descriptor, number)


def wait_until(holds: Callable[[], object], goes_on: Callable[[], object] = lambda: True) -> None:
    """Wait for something that has to happen, however slow the machine is. `goes_on`: whether it still can."""
    until = time.monotonic() + TIMEOUT_S
    while True:
        may_come = goes_on()
        if holds():
            return
        assert may_come, "it ended before that"
        assert time.monotonic() < until, "it did not come to that"
        time.sleep(0.01)


def check_server() -> None:
    """Raises AssertionError if the process that this one was forked from is none to fork from."""
    threads = len(os.listdir(f"/proc/{os.getppid()}/task"))
    assert threads == 1, f"the fork server has {threads} threads: what libraries.py imports must start none"
    assert "deepspeed" in sys.modules, "the fork server could not import tests/support/libraries.py"
    distributed = sys.modules["torch.distributed"]
    assert not distributed.is_initialized(), "the fork server has joined a process group"


def _name(function: Callable[..., Any]) -> str:
    """Name of a function, or of a partial, which has no name of its own."""
    return getattr(function, "__qualname__", repr(function))


@cache
def _fork_server() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.support.libraries"])
    with patch.dict(os.environ, SERVER):
        forkserver.ensure_running()
    return context


def _host_main(output: Path, results: Connection, function: Callable[..., Any], args: tuple) -> None:
    global _in_host
    _in_host = True
    server = os.getppid()
    os.setsid()
    write_output_to(output)
    faulthandler.enable()
    die_with_parent(server)
    check_server()
    results.send(function(*args))


def _kill_session(leader: BaseProcess) -> None:
    """The process, and all of its session, also what has left its process group."""
    if leader.is_alive():
        leader.kill()
    for entry in os.listdir("/proc"):
        with suppress(OSError):
            if entry.isdecimal() and os.getsid(int(entry)) == leader.pid:
                os.kill(int(entry), signal.SIGKILL)


@dataclass(frozen=True)
class _Ended:
    exit_code: int
    hung: bool
    result: Any

    @property
    def fate(self) -> str:
        if self.hung:
            return "hung and was killed"
        if self.exit_code < 0:
            return f"died by {signal.Signals(-self.exit_code).name}"
        return f"ended with exit code {self.exit_code}"


def _results_of_ranks(
    method: str, world_size: int, function: Callable[..., Any], args: tuple, timeout_s: float
) -> list[Any]:
    ended = _run(method, world_size, function, args, timeout_s)
    failed = [f"rank {rank} {one.fate}" for rank, one in enumerate(ended) if one.exit_code]
    if failed:
        raise AssertionError(f"{_name(function)}: {', '.join(failed)}")
    return [one.result for one in ended]


def _exit_codes_of_ranks(
    world_size: int, function: Callable[..., Any], args: tuple, timeout_s: float
) -> list[int]:
    return [one.exit_code for one in _run("fork", world_size, function, args, timeout_s)]


def _run(
    method: str, world_size: int, function: Callable[..., Any], args: tuple, timeout_s: float
) -> list[_Ended]:
    context = multiprocessing.get_context(method)
    pipes = [context.Pipe(duplex=False) for _ in range(world_size)]
    with reserved_port() as port:
        ranks = [
            context.Process(target=_rank_main, args=(rank, world_size, port, results, function, args))  # type: ignore[attr-defined]
            for rank, (_, results) in enumerate(pipes)
        ]
        for process in ranks:
            process.start()
        return _wait(ranks, [receive for receive, _ in pipes], timeout_s)


def _rank_main(
    rank: int, world_size: int, port: int, results: Connection, function: Callable[..., Any], args: tuple
) -> None:
    host = multiprocessing.parent_process()  # os.getppid() is another process's if it has just been killed
    assert host is not None
    assert host.pid is not None
    die_with_parent(host.pid)  # a test run that is killed kills no session, but the fork server goes
    os.environ |= launched_as(rank, world_size, port)
    result = function(*args)
    results.send(result)


def launched_as(rank: int, world_size: int, port: int) -> dict[str, str]:
    """Environment that a launcher gives a rank of a job on this machine."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
    }


@contextmanager
def reserved_port() -> Iterator[int]:
    """A port that the system gives to nobody else meanwhile; servers, which set SO_REUSEADDR, can take it."""
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("", 0))
        yield holder.getsockname()[1]


def _wait(processes: Sequence[BaseProcess], results: Sequence[Connection], timeout_s: float) -> list[_Ended]:
    """The ends of all; what goes on after `timeout_s` prints its stacks, if it can, and is killed."""
    until, received = time.monotonic() + timeout_s, {}
    # looked at rather than waited for: a child that a process leaves keeps its sentinel from being ready
    while (alive := [process for process in processes if process.is_alive()]) and time.monotonic() < until:
        received |= _received(results, received, _LOOK_S)
    received |= _received(results, received, 0)
    if alive:
        _end(alive)
    for process in processes:
        process.join()
    return [
        _Ended(process.exitcode or 0, process in alive, received.get(number))
        for number, process in enumerate(processes)
    ]


def _received(results: Sequence[Connection], known: Mapping[int, Any], seconds: float) -> dict[int, Any]:
    """Messages received, by number of the pipe, from ranks that have not reported yet."""
    pending = {pipe: number for number, pipe in enumerate(results) if number not in known}
    if not pending:
        time.sleep(seconds)
    found = {}
    for pipe in connection.wait(list(pending), seconds) if pending else ():
        with suppress(EOFError):
            found[pending[pipe]] = pipe.recv()  # type: ignore[index, union-attr]
    return found


def _end(hung: Sequence[BaseProcess]) -> None:
    for process in hung:
        assert process.pid
        os.kill(process.pid, signal.SIGABRT)
    time.sleep(_STACKS_S)
    for process in hung:
        process.kill()
