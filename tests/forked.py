"""Worker scripts whose ranks are forked: libraries are imported once for all ranks of all jobs.

A test starts the script with `run_worker`; the script calls `run_ranks`. A fresh process of its own, because
forking is safe only before threads exist.
"""

import multiprocessing
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from tests.distributed import ROOT, on_cpu


def run_worker(script: Path, *args: object, timeout: int = 600) -> None:
    """Run `python script args` on the CPU; raises with its output if it fails."""
    done = subprocess.run(
        [sys.executable, str(script), *map(str, args)],
        cwd=ROOT,
        env=on_cpu(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
    )
    if done.returncode:
        raise AssertionError(f"{script.name} failed:\n{done.stdout[-8000:]}")


def run_ranks(world_size: int, job: Callable[[], object], timeout: int = 300) -> None:
    """Call `job` in `world_size` forked ranks; ends this process if any of them fails."""
    exit_codes = exit_codes_of(world_size, job, timeout)
    if any(exit_codes):
        sys.exit(f"ranks ended with {exit_codes}")


def exit_codes_of(world_size: int, job: Callable[[], object], timeout: int = 300) -> list[int | None]:
    """Call `job` in `world_size` forked processes with the environment that torchrun would give them."""
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]

    def rank_main(rank: int) -> None:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
        os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
        job()

    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=rank_main, args=(rank,)) for rank in range(world_size)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(timeout)
        process.kill()
        process.join()
    return [process.exitcode for process in ranks]


def write_output_to(path: Path) -> None:
    """Let everything that this process prints from now on go to the end of a file."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(descriptor, stream.fileno())
