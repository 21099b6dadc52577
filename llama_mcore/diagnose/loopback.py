"""One all_reduce between ranks of this machine, in a process of its own that is killed when it hangs.

    python -m llama_mcore.diagnose.loopback RANKS FOLDER LIMIT_S

writes to FOLDER/speed the bytes per second of an all_reduce of 16 MB: the buffer's size by the time that it
takes. Not to stdout, where NCCL may log. In FOLDER the ranks also find each other.
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

import torch.distributed as dist

from llama_mcore.diagnose.allreduce import all_reduce_speed
from llama_mcore.diagnose.finding import Finding
from llama_mcore.distributed.device import communication_backend, on_gpu, select_device
from llama_mcore.errors import shown

MODULE = "llama_mcore.diagnose.loopback"
LIMIT_S = 20.0
# To import torch, which a cold or crowded disk makes slow, and which hangs where that disk does.
START_S = 120.0
REMEDY = "look at the host's name and at GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME; NCCL_DEBUG=INFO says more"


def loopback(
    ranks: int, environ: Mapping[str, str], limit_s: float = LIMIT_S, start_s: float = START_S
) -> Finding:
    """A training run needs it to work; ranks that hang are killed after `limit_s` seconds of their own."""
    meaning = f"an all_reduce of 16 MB between {ranks} ranks of this machine"
    found = partial(
        Finding, "collectives", f"{communication_backend()} loopback", meaning=meaning, required=True
    )
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", MODULE, str(ranks), folder, str(limit_s)]
        failure = failure_of(command, environ, start_s + limit_s)
        if failure is not None:
            return found(status="problem", value=failure, remedy=REMEDY)
        speed = float(Path(folder, "speed").read_text())
    return found(status="ok", value=f"{speed / 1e9:.2f} GB/s")


def failure_of(command: list[str], environ: Mapping[str, str], limit_s: float) -> str | None:
    """Run it; what went wrong. On every way out it and all that it started are gone."""
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=dict(environ),
        start_new_session=True,
    )
    try:
        _, complaint = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        return f"failed: did not end in {limit_s:g} s and was killed"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    return f"failed: {_reason(complaint)}" if process.returncode else None


def _reason(complaint: str) -> str:
    """The last error that a traceback names."""
    lines = [line for line in complaint.splitlines() if line.strip()]
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
    """Wait until all have ended. Where one fails or time is up the others are killed; SystemExit says why."""
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
