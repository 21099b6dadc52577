"""What only the node of a rank can tell before a run: the run's folder as it writes it, memory, and
what would compute."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

import torch

from llama_mcore.checkpoint.run_dir import PREFLIGHT_MARK as MARK
from llama_mcore.config.schema import RunConfig
from llama_mcore.diagnose.finding import Finding
from llama_mcore.distributed.cgroup import available_memory, memory_limit
from llama_mcore.distributed.device import gpu_memory_bytes
from llama_mcore.errors import ConfigError
from llama_mcore.model.attention import Choice, attention_for
from llama_mcore.model.kernels import kernels_for
from llama_mcore.plan.layout.footprint import Footprint, memory_of
from llama_mcore.units import format_bytes

FOREIGN_SHARE = 0.05
"""Of a GPU's memory: less may be this process's own."""


@contextmanager
def shared_mark(run_dir: Path) -> Iterator[str]:
    """Rank 0's part of `run_folder`: a file in the run's folder, by whose content others know that it is the
    same folder. Removed again on leaving, with the folder where that was not there before."""
    made = [path for path in (run_dir, *run_dir.parents) if not path.exists()]
    content = ""
    try:
        with suppress(OSError):  # every rank will say so
            run_dir.mkdir(parents=True, exist_ok=True)
            (run_dir / MARK).write_text(written := uuid4().hex)
            content = written
        yield content
    finally:
        with suppress(OSError):
            (run_dir / MARK).unlink()
        with suppress(OSError):
            for path in made:
                path.rmdir()


def run_folder(run_dir: Path, rank: int, mark: str, wait_s: float = 10.0) -> Finding:
    """What a save does works there: create, write, fsync, rename, read; and it is the folder of rank 0, which
    a network file system may show `wait_s` later."""
    probe = run_dir / f"{MARK}-{rank:05d}"
    shared = not mark or _shows(run_dir / MARK, mark, wait_s)
    try:
        if shared:
            _write_and_read(probe)
    except OSError as error:
        remedy = "choose another folder, or make it writable from every node"
        reason = f"cannot be used ({error.strerror})"
        return _problem("run folder", "run.dir", str(run_dir), reason, remedy)
    finally:
        for path in (probe, _temporary(probe)):
            with suppress(OSError):
                path.unlink()
    if not shared:
        remedy = "choose one on a file system that all nodes mount"
        return _problem("run folder", "run.dir", str(run_dir), "is not the folder that rank 0 sees", remedy)
    return _ok("run folder", "run.dir", f"{run_dir} can be written")


def _write_and_read(probe: Path) -> None:
    content, temporary = os.urandom(4096), _temporary(probe)
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(probe)
    if probe.read_bytes() != content:
        raise OSError(0, "gives back something else than was written")


def _temporary(probe: Path) -> Path:
    return probe.with_name(f"{probe.name}.tmp")


def _shows(path: Path, content: str, wait_s: float) -> bool:
    until = time.monotonic() + wait_s
    while True:
        with suppress(OSError):
            if path.read_text() == content:
                return True
        if time.monotonic() >= until:
            return False
        time.sleep(0.1)


def memory(run: RunConfig, ranks: int, ranks_here: int) -> list[Finding]:
    """What training allocates against the memory of this rank's GPU, or its share of the machine's; the host
    memory that saves go through; and what other processes hold of that GPU.

    Model state and what the forward keeps are certain: without room for these nothing runs. Buffers, working
    memory and the allocator's margin are estimates: without room for them too it may not.
    """
    found = memory_of(run, ranks)
    gpu = gpu_memory_bytes()
    saves = _saves(run, found, ranks_here, gpu=gpu is not None)
    if gpu is None:
        return [_fits(found, _machine_memory() // ranks_here, gpu=False), saves]
    free, total = gpu
    # What this process holds by now, a context and NCCL's buffers, is what the plan counts as libraries.
    foreign = max(0, total - free - found.libraries)
    fits = _fits(found, total - foreign, gpu=True)
    if foreign < FOREIGN_SHARE * total:
        return [fits, saves]
    value = f"about {format_bytes(foreign)} of {format_bytes(total)}"
    meaning, remedy = "another process uses this GPU", "nvidia-smi names it: end it, or take another GPU"
    return [fits, saves, Finding("memory", "in use", "note", value, meaning, remedy, required=True)]


def _saves(run: RunConfig, found: Footprint, ranks_here: int, *, gpu: bool) -> Finding:
    """As checkpoint/snapshot.py decides when training has taken its own, which is not taken yet."""
    training = found.host_state + (0 if gpu else found.total - found.libraries)
    limit = run.checkpoint.copy_limit(max(0, available_memory() // ranks_here - training))
    name, value = (
        "checkpoints",
        f"{format_bytes(found.state.saved)} of host memory a rank, to copy what it saves",
    )
    if found.state.saved <= limit:
        return _ok("memory", name, value)
    ring = format_bytes(run.checkpoint.ring_bytes)
    meaning = f"more than it may take: a ring of {ring}, and training waits while a checkpoint is written"
    remedy = "more memory on each node, or more ranks; checkpoint.host_memory sets what a rank may take"
    return Finding("memory", name, "note", value, meaning, remedy, required=True)


def _fits(found: Footprint, total: int, *, gpu: bool) -> Finding:
    # Without a GPU, offloaded state lies in the same memory, and there is no device's context.
    elsewhere, libraries = (found.host_state, 0) if gpu else (0, found.libraries)
    certain = found.state.total - elsewhere + found.saved_layers + found.saved_rest
    estimate = found.total + (0 if gpu else found.host_state) - libraries
    name = "model state and activations"
    value = f"{format_bytes(certain)}, about {format_bytes(estimate)} with all that comes and goes"
    has = f"{format_bytes(total)} that a rank has here"
    remedy = "more ranks, a higher zero.stage or parallel.tp; llama-mcore plan layout finds what fits"
    if certain > total:
        return _problem("memory", name, value, f"must be less than the {has}", remedy)
    if estimate > total:
        meaning = f"the second figure, an estimate, is more than the {has}: it may run out of memory"
        return Finding("memory", name, "note", value, meaning, remedy, required=True)
    return _ok("memory", name, f"{value}, of {has}")


def kernels(run: RunConfig) -> list[Finding]:
    """What would compute attention and the rest on this rank's device, or why nothing would."""
    dtype = torch.bfloat16 if run.train.precision == "bf16" else torch.float32
    documents = run.data.attention_boundary is not None
    choices: dict[str, Callable[[], Choice]] = {
        "attention": lambda: attention_for(run.model, dtype, documents),
        "norms, rotation, SwiGLU": lambda: kernels_for(run.model.kernels),
    }
    findings = []
    for name, choose in choices.items():
        try:
            findings.append(_ok("kernels", name, str(choose())))
        except ConfigError as error:
            found = error.problems[0]
            findings.append(_problem("kernels", found.field, str(found.value), found.reason, found.remedy))
    return findings


def _machine_memory() -> int:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(total, memory_limit() or total)


def _ok(group: str, name: str, value: str) -> Finding:
    return Finding(group, name, "ok", value, required=True)


def _problem(group: str, name: str, value: str, meaning: str, remedy: str) -> Finding:
    return Finding(group, name, "problem", value, meaning, remedy, required=True)
