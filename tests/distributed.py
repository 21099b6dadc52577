"""Run a worker script of the tests under torchrun on this machine: real processes, real gloo, on the CPU."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def torchrun(world_size: int, script: Path, *args: object, timeout: int = 900) -> None:
    """Run `script` with one process per rank; raises with the job's output if any rank fails."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", world_size]
    result = subprocess.run(
        [str(part) for part in (*command, script, *args)],
        cwd=ROOT,
        env=on_cpu(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
    )
    if result.returncode:
        raise AssertionError(f"{script.name} failed on {world_size} ranks:\n{result.stdout[-8000:]}")


def on_cpu() -> dict[str, str]:
    """This environment for a job of CPU processes, which share the cores of the machine."""
    return os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
