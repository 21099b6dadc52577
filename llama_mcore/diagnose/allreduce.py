"""Speed and result of an all_reduce: over a group of a job, or over ranks of this machine (loopback).

    python -m llama_mcore.diagnose.allreduce RANKS FOLDER LIMIT_S

is the loopback, in a process of its own that is killed when it hangs. It writes the speed to FOLDER/speed,
not to stdout, where NCCL may log. In FOLDER the ranks also find each other.
"""

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
import torch.distributed as dist

from llama_mcore.diagnose.finding import Finding
from llama_mcore.distributed.device import communication_backend, on_gpu, seconds_of, select_device
from llama_mcore.errors import shown

MODULE = "llama_mcore.diagnose.allreduce"
BYTES = 16_000_000
REPEATS = 3
LIMIT_S = 20.0
# Seconds to import torch, which a cold or crowded disk makes slow, and which hangs where that disk does.
START_S = 120.0
REMEDY = "check the host's name and GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME; NCCL_DEBUG=INFO shows details"


def all_reduce_speed(device: torch.device, group: dist.ProcessGroup | None = None) -> float:
    """Bytes per second of an all_reduce of 16 MB over `group`, or the world: the buffer's size by the time of
    the fastest. Raises ArithmeticError for a wrong sum.

    Collective: all ranks of the group call it.
    """
    tensor = torch.ones(BYTES // 4, device=device)
    ranks = dist.get_world_size(group)
    fastest = float("inf")
    for _ in range(1 + REPEATS):
        tensor.fill_(1)
        fastest = min(fastest, seconds_of(lambda: dist.all_reduce(tensor, group=group)))
        if not bool((tensor == ranks).all()):
            raise ArithmeticError("all_reduce gave a wrong sum")
    return BYTES / fastest


def loopback(
    ranks: int, environ: Mapping[str, str], limit_s: float = LIMIT_S, start_s: float = START_S
) -> Finding:
    """Finding on an all_reduce between ranks of this machine; those that hang are killed after `limit_s`."""
    meaning = f"an all_reduce of 16 MB between {ranks} ranks of this machine"
    found = partial(
        Finding, "collectives", f"{communication_backend()} loopback", meaning=meaning, required=True
    )
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", MODULE, str(ranks), folder, str(limit_s)]
        failure = failure_of_command(command, environ, start_s + limit_s)
        if failure is not None:
            return found(status="problem", value=failure, remedy=REMEDY)
        speed = float(Path(folder, "speed").read_text())
    return found(status="ok", value=f"{speed / 1e9:.2f} GB/s")


def failure_of_command(command: list[str], environ: Mapping[str, str], limit_s: float) -> str | None:
    """Run a command and return why it failed, if it did. On every way out it and all it started are gone."""
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=dict(environ),
        start_new_session=True,
    )
    try:
        _, errors = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        return f"failed: did not end within {limit_s:g} s and was killed"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    return f"failed: {_last_error(errors)}" if process.returncode else None


def _last_error(output: str) -> str:
    """Last line of the output that names an error, as a traceback ends; else its last line."""
    lines = [line for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exit)\b", line)]
    return shown((errors or lines or ["no message"])[-1])


def main() -> None:
    """Fork the ranks, which is safe as long as this process has not touched a GPU."""
    ranks, folder, limit_s = int(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])
    fork = get_context("fork")
    processes = [fork.Process(target=_rank, args=(rank, ranks, folder)) for rank in range(ranks)]
    for process in processes:
        process.start()
    end_together(processes, limit_s)


def end_together(processes: Sequence[BaseProcess], limit_s: float) -> None:
    """Wait until all have ended; kill the others where one fails or time is up. SystemExit says why."""
    deadline = time.monotonic() + limit_s
    while alive := [process for process in processes if process.is_alive()]:
        # Before each wait, as a process closes its sentinel a moment before it has an exit code: the others
        # would wait for it, and its reason be lost.
        if any(process.exitcode for process in processes):
            _kill(alive)
        elif not wait([process.sentinel for process in alive], max(0.0, deadline - time.monotonic())):
            _kill(alive)
            sys.exit(f"hung for {limit_s:g} s and was killed")
    exit_codes = [process.exitcode for process in processes]
    if any(exit_codes):
        sys.exit(f"ranks ended with {exit_codes}")


def _kill(processes: Sequence[BaseProcess]) -> None:
    for process in processes:
        process.kill()
        process.join()


def _rank(rank: int, ranks: int, folder: Path) -> None:
    os.environ["LOCAL_RANK"] = str(rank)
    device = select_device()
    dist.init_process_group(
        communication_backend(),
        store=dist.FileStore(str(folder / "store"), ranks),
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=LIMIT_S),
        device_id=device if on_gpu() else None,
    )
    try:
        speed = all_reduce_speed(device)
        if rank == 0:
            (folder / "speed").write_text(str(speed))
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
