"""Worker: start job.py with our torchrun in every way that test_torchrun.py looks at.

    python tests/launch/launches.py FOLDER

FOLDER/NAME.txt has what launch NAME printed, FOLDER/exit_codes.json how each ended. Launchers are forked, so
that torch is imported once.
"""

import json
import os
import signal
import socket
import sys
import time
from multiprocessing import get_context
from pathlib import Path

from llama_mcore.launch import torchrun, workers
from llama_mcore.launch.torchrun import run
from llama_mcore.train.signals import ECHO_S
from tests.forked import write_output_to

JOB = str(Path(__file__).with_name("job.py"))
EXITS = [0, 75, 64, 73, 3, -9, -11]
SIGNALS = [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT]


def main() -> None:
    folder = Path(sys.argv[1])
    os.environ.pop("OMP_NUM_THREADS", None)
    found = {f"exit{code}": launch(folder, f"exit{code}", "exit", str(code)) for code in EXITS}
    found["threads"] = launch(folder, "threads", "threads", str(folder))
    found["held"] = launch(folder, "held", "held", str(folder))
    found["alone"] = stop_a_node_that_waits_for_another()
    for number in SIGNALS:
        (folder / number.name).mkdir()
        arguments = ("signal", str(folder / number.name))
        found[number.name] = launch(folder, f"{number.name}", *arguments, number=number)
    (folder / "deaf").mkdir()
    found["deaf"] = launch(folder, "deaf", "deaf", str(folder / "deaf"), number=signal.SIGTERM, again=True)
    found["nodes"] = max(launch_on_nodes(folder, "node", "place"))
    found["failed"] = launch_on_nodes(folder, "failed-node", "fails", workers=1)
    found["missing"] = launch_without_another_node(folder)
    (folder / "exit_codes.json").write_text(json.dumps(found))


def launch(
    folder: Path,
    name: str,
    *arguments: str,
    number: signal.Signals | None = None,
    again: bool = False,
) -> int | None:
    """Exit code of torchrun with two workers; with `number`, it gets that signal when both are ready, and
    `again` as a second request."""

    def command() -> None:
        write_output_to(folder / f"{name}.txt")
        workers.WORKERS_END_S = 1.0
        sys.exit(run(["--nproc-per-node", "2", JOB, *arguments]))

    launcher = get_context("fork").Process(target=command)
    launcher.start()
    if number and launcher.pid:
        while launcher.is_alive() and len(list((folder / name).glob("ready-*"))) < 2:
            time.sleep(0.01)
        os.kill(launcher.pid, number)
        if again:
            time.sleep(ECHO_S + 0.5)
            os.kill(launcher.pid, number)
    launcher.join(timeout=120)
    launcher.kill()
    launcher.join()
    return launcher.exitcode


def stop_a_node_that_waits_for_another() -> int | None:
    """Exit code of the launcher of one of two nodes, of which the other never comes."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        where = ["--master-addr", "localhost", "--master-port", str(free.getsockname()[1])]

    def command() -> None:
        sys.exit(run(["--nnodes", "2", *where, JOB, "exit", "0"]))

    launcher = get_context("fork").Process(target=command)
    launcher.start()
    time.sleep(1.0)  # whenever it comes: before the wait or in it
    launcher.terminate()
    launcher.join(timeout=60)
    launcher.kill()
    launcher.join()
    return launcher.exitcode


def launch_without_another_node(folder: Path) -> int | None:
    """Exit code of the launcher of the first of two nodes, of which the other is not waited for long."""

    def command() -> None:
        write_output_to(folder / "missing.txt")
        torchrun.LIMIT_S = 2.0
        where = ["--master-addr", "localhost", "--master-port", "20017"]
        sys.exit(run(["--nnodes", "2", *where, JOB, "exit", "0"]))

    launcher = get_context("fork").Process(target=command)
    launcher.start()
    launcher.join(timeout=60)
    launcher.kill()
    launcher.join()
    return launcher.exitcode


def launch_on_nodes(folder: Path, name: str, what: str, workers: int = 2) -> list[int]:
    """A launcher on each of two nodes, as slurm/run.sh has them started, with a port that is taken: their
    exit codes."""
    taken = socket.create_server(("localhost", 0))  # by another program, which says nothing
    port = str(taken.getsockname()[1])

    def on_node(number: int) -> None:
        write_output_to(folder / f"{name}-{number}.txt")
        os.environ["SLURM_NODEID"] = str(number)
        where = ["--master-addr", "localhost", "--master-port", port, "--rdzv-id", "7"]
        sys.exit(run(["--nnodes", "2", "--nproc-per-node", str(workers), *where, JOB, what, str(folder)]))

    nodes = [get_context("fork").Process(target=on_node, args=(number,)) for number in range(2)]
    for node in nodes:
        node.start()
    for node in nodes:
        node.join(timeout=120)
        node.kill()
        node.join()
    return [node.exitcode or 0 for node in nodes]


if __name__ == "__main__":
    main()
