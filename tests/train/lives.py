"""Lives of a run on two ranks in which something happens at a known moment: worker of other tests.

    python tests/train/lives.py FOLDER LIVES.json

LIVES.json: for each name, in their order, a `Life`: overrides, the fault, its place and the ranks it meets.
FOLDER/NAME.json has the exit codes and what was printed. Ranks are forked, so that torch is imported once,
and this script ends the others when one has failed, as launchers do.
"""

import json
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path

from llama_mcore.observe.log import silence_libraries

silence_libraries(cpu=True)

from llama_mcore import cli  # noqa: E402
from llama_mcore.launch.heartbeat import Pulse  # noqa: E402
from llama_mcore.observe.phases import Phase  # noqa: E402
from llama_mcore.train import loop  # noqa: E402
from llama_mcore.train.signals import STOP_SIGNALS  # noqa: E402
from tests.forked import write_output_to  # noqa: E402

LONGEST_S = 120
LAUNCHER_KILLS_S = 30


@dataclass(frozen=True)
class Life:
    overrides: list[str]
    fault: str = ""
    phase: str = "train"
    step: int = 5
    ranks: list[int] = field(default_factory=list)
    world_size: int = 2
    """As the ranks are told."""
    started: int = 2
    job: str = ""
    """SLURM_JOB_ID."""
    restarts: str = "0"
    """SLURM_RESTART_COUNT."""


def keep_the_interpreter() -> None:
    sum(range(10**14))  # one call in C, which neither lets go of the lock nor looks for signals


def read_what_never_comes() -> None:
    fifo = Path(tempfile.mkdtemp()) / "fifo"
    os.mkfifo(fifo)
    fifo.read_bytes()


def be_stopped() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def be_killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def leave_early() -> None:
    os._exit(0)


def fail() -> None:
    raise RuntimeError("a fault of the test")


def ask(number: signal.Signals) -> Callable[[], None]:
    """A request to stop, as a launcher passes it on: to the process that it started."""
    return lambda: os.kill(os.getppid(), number)


def ask_twice() -> None:
    """By another process, as this one is stuck."""
    supervisor = os.getppid()
    if os.fork() == 0:
        for pause in (0.5, 4.0):
            time.sleep(pause)
            os.kill(supervisor, signal.SIGTERM)
        os._exit(0)
    keep_the_interpreter()


FAULTS: dict[str, Callable[[], None]] = {
    "gil": keep_the_interpreter,
    "read": read_what_never_comes,
    "stopped": be_stopped,
    "killed": be_killed,
    "leaves": leave_early,
    "fails": fail,
    "USR1": ask(signal.SIGUSR1),
    "TERM": ask(signal.SIGTERM),
    "twice": ask_twice,
}


def prepare(life: Life, rank: int) -> None:
    """Let the fault happen in this rank when the phase of its step begins; "data": when the step is read."""
    if rank not in life.ranks:
        return
    fault = FAULTS[life.fault]
    if life.phase == "before":
        os.kill(os.getpid(), signal.Signals[f"SIG{life.fault}"])
        return
    if life.phase == "data":
        read, count = loop.islice, iter(range(1, 1000))

        def islice(batches, number):
            if next(count) == life.step:
                fault()
            return read(batches, number)

        loop.islice = islice  # type: ignore[assignment,misc]
        return
    enter = Pulse.enter

    def entered(pulse: Pulse, phase: Phase, step: int) -> None:
        enter(pulse, phase, step)
        if phase is Phase(life.phase) and step == life.step:
            fault()

    Pulse.enter = entered  # type: ignore[method-assign]


def rank_main(life: Life, rank: int, port: int, output: Path) -> None:
    write_output_to(output)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(life.world_size)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    os.environ |= {"TORCHELASTIC_RESTART_COUNT": "0", "SLURM_JOB_ID": life.job}
    os.environ["SLURM_RESTART_COUNT"] = life.restarts
    sys.argv = ["train.py", "--config", "tiny", *life.overrides]
    prepare(life, rank)
    cli.main("train")


def live(life: Life, output: Path) -> dict[str, object]:
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    fork = get_context("fork")
    ranks = [fork.Process(target=rank_main, args=(life, rank, port, output)) for rank in range(life.started)]
    # As our torchrun has it: a signal kills no rank that is just starting.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    for process in ranks:
        process.start()
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    if life.fault == "never-come":
        time.sleep(1.0)  # whenever it comes, it has to end the rank
        ranks[0].terminate()
    first = wait_for_all(ranks)
    codes = [process.exitcode for process in ranks]
    return {"codes": codes, "first": first, "output": output.read_text()}


def wait_for_all(ranks: list[BaseProcess]) -> int | None:
    """Exit code of the first that failed; as torchrun, it then ends the others, the patient way."""
    until, first = time.monotonic() + LONGEST_S, None
    while any(process.is_alive() for process in ranks):
        failed = [process.exitcode for process in ranks if process.exitcode]
        if failed and first is None:
            first, until = failed[0], time.monotonic() + LAUNCHER_KILLS_S
            for process in ranks:
                process.terminate()
        if time.monotonic() > until:
            for process in ranks:
                process.kill()
        time.sleep(0.02)
    return first if first is not None else next((code for p in ranks if (code := p.exitcode)), 0)


def main() -> None:
    folder = Path(sys.argv[1])
    for name, settings in json.loads(Path(sys.argv[2]).read_text()).items():
        found = live(Life(**settings), folder / f"{name}.txt")
        (folder / f"{name}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
