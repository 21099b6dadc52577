"""One all_reduce between ranks of this machine, in a process of its own that is killed when it hangs.

    python -m llama_mcore.launch.loopback RANKS FOLDER

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
from collections.abc import Mapping
from datetime import timedelta
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import wait
from pathlib import Path

import torch
import torch.distributed as dist

from llama_mcore.errors import shown
from llama_mcore.launch.finding import Finding
from llama_mcore.parallel.device import communication_backend, on_gpu, select_device, synchronize

MODULE = "llama_mcore.launch.loopback"
LIMIT_S = 20.0
BYTES = 16_000_000
REPEATS = 3
REMEDY = "look at the host's name and at GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME; NCCL_DEBUG=INFO says more"


def loopback(ranks: int, environ: Mapping[str, str], limit_s: float = LIMIT_S) -> Finding:
    """A training run needs it to work; a hang is a problem after `limit_s` seconds."""
    meaning = f"an all_reduce of 16 MB between {ranks} ranks of this machine"
    found = partial(
        Finding, "collectives", f"{communication_backend()} loopback", meaning=meaning, required=True
    )
    with tempfile.TemporaryDirectory() as folder:
        failure = _failure([sys.executable, "-m", MODULE, str(ranks), folder], environ, limit_s)
        if failure is not None:
            return found(status="problem", value=failure, remedy=REMEDY)
        speed = float(Path(folder, "speed").read_text())
    return found(status="ok", value=f"{speed / 1e9:.2f} GB/s")


def _failure(command: list[str], environ: Mapping[str, str], limit_s: float) -> str | None:
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
        return f"hung for {limit_s:g} s and was killed"
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
    ranks, folder = int(sys.argv[1]), Path(sys.argv[2])
    fork = get_context("fork")
    processes = [fork.Process(target=_rank, args=(rank, ranks, folder)) for rank in range(ranks)]
    for process in processes:
        process.start()
    while alive := [process for process in processes if process.is_alive()]:
        wait([process.sentinel for process in alive])
        if any(process.exitcode for process in processes):
            # The others would wait for the one that failed, and its reason be lost.
            for process in alive:
                process.kill()
    if any(process.exitcode for process in processes):
        sys.exit(1)


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
        tensor = torch.ones(BYTES // 4, device=device)
        fastest = min(_timed_all_reduce(tensor) for _ in range(1 + REPEATS))
        # each of the 1 + REPEATS sums multiplies by the number of ranks
        if not bool((tensor == ranks ** (1 + REPEATS)).all()):
            sys.exit("all_reduce gave a wrong sum")
        if rank == 0:
            (folder / "speed").write_text(f"{BYTES / fastest}")
    finally:
        dist.destroy_process_group()


def _timed_all_reduce(tensor: torch.Tensor) -> float:
    """Seconds."""
    synchronize()
    start = time.perf_counter()
    dist.all_reduce(tensor)
    synchronize()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
