"""Checks before a run of what only the node of a rank can tell: whether it can write the run's folder,
memory, kernels, and versions."""

import hashlib
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from uuid import uuid4

import torch

from llama_mcore.checkpoint.config import CheckpointConfig
from llama_mcore.checkpoint.run_dir import PREFLIGHT_MARK as MARK
from llama_mcore.config.schema import RunConfig
from llama_mcore.diagnose.finding import Finding
from llama_mcore.distributed.cgroup import available_memory, memory_limit
from llama_mcore.distributed.device import device_name, gpu_library_versions, gpu_memory_bytes
from llama_mcore.errors import ConfigError
from llama_mcore.model.attention import Choice, attention_for
from llama_mcore.model.config import ModelConfig
from llama_mcore.model.kernels import kernels_for
from llama_mcore.plan.layout.footprint import Footprint, memory_of
from llama_mcore.small_file import read_small_file
from llama_mcore.units import format_bytes

FOREIGN_SHARE = 0.05
"""Share of a GPU's memory; less than this in use may be this process's own."""
PACKAGES = ("torch", "megatron-core", "deepspeed", "numpy")
SOURCES = Path(__file__).parents[1]
_LARGEST_SOURCE = 16 << 20


@contextmanager
def shared_mark(run_dir: Path) -> Iterator[str]:
    """Content of a file that rank 0 writes into the run's folder, by which the others know that they see the
    same folder. Removed on leaving, as is the folder where it did not exist before."""
    made = [path for path in (run_dir, *run_dir.parents) if not path.exists()]
    content = ""
    try:
        with suppress(OSError):  # every rank will report it
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
    """Finding on the run's folder: whether this rank can create, write, fsync, rename and read files in it as
    a save does, and whether it is rank 0's, which a network file system may show up to `wait_s` later."""
    probe = run_dir / f"{MARK}-{rank:05d}"
    shared = not mark or _appears(run_dir / MARK, mark, wait_s)
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
        remedy = "choose a folder on a file system that all nodes mount"
        return _problem("run folder", "run.dir", str(run_dir), "is not the same folder as on rank 0", remedy)
    return _ok("run folder", "run.dir", f"{run_dir} can be written")


def _write_and_read(probe: Path) -> None:
    content, temporary = os.urandom(4096), _temporary(probe)
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(probe)
    if probe.read_bytes() != content:
        raise OSError(0, "returns other bytes than were written")


def _temporary(probe: Path) -> Path:
    return probe.with_name(f"{probe.name}.tmp")


def _appears(path: Path, content: str, wait_s: float) -> bool:
    until = time.monotonic() + wait_s
    while True:
        with suppress(OSError):
            if path.read_text() == content:
                return True
        if time.monotonic() >= until:
            return False
        time.sleep(0.1)


def memory(run: RunConfig, ranks: int, ranks_here: int) -> list[Finding]:
    """Findings on memory: of training against that of this rank's GPU, or its share of the machine's; of
    saves on the host; and of other processes on that GPU.

    Model state and activations are certain: without room for these nothing runs. Buffers, working memory and
    the allocator's margin are estimates: without room for them too it may fail.
    """
    found = memory_of(run, ranks)
    gpu = gpu_memory_bytes()
    saves = _saves(run.checkpoint, found, ranks_here, gpu=gpu is not None)
    if gpu is None:
        return [_fits(found, _machine_memory() // ranks_here, gpu=False), saves]
    free, total = gpu
    # This process holds a context and NCCL's buffers by now, which the plan counts as libraries.
    foreign = max(0, total - free - found.libraries)
    fits = _fits(found, total - foreign, gpu=True)
    if foreign < FOREIGN_SHARE * total:
        return [fits, saves]
    value = f"about {format_bytes(foreign)} of {format_bytes(total)}"
    meaning, remedy = "other processes use this GPU", "nvidia-smi lists them: end them, or use another GPU"
    return [fits, saves, Finding("memory", "in use", "note", value, meaning, remedy, required=True)]


def _saves(checkpoint: CheckpointConfig, found: Footprint, ranks_here: int, *, gpu: bool) -> Finding:
    """Finding on the host memory of saves."""
    # checkpoint/snapshot.py decides alike, once training has allocated its own
    training = found.host_state + (0 if gpu else found.total - found.libraries)
    limit = checkpoint.copy_limit(max(0, available_memory() // ranks_here - training))
    name, value = (
        "checkpoints",
        f"{format_bytes(found.state.saved)} of host memory per rank, for copies of what it saves",
    )
    if found.state.saved <= limit:
        return _ok("memory", name, value)
    ring = format_bytes(checkpoint.ring_bytes)
    meaning = (
        f"more than the limit: it uses a ring of {ring}, and training waits while a checkpoint is written"
    )
    remedy = "use nodes with more memory, or more ranks; checkpoint.host_memory sets the limit of a rank"
    return Finding("memory", name, "note", value, meaning, remedy, required=True)


def _fits(found: Footprint, total: int, *, gpu: bool) -> Finding:
    # Without a GPU, offloaded state lies in the same memory, and there is no device's context.
    elsewhere, libraries = (found.host_state, 0) if gpu else (0, found.libraries)
    certain = found.state.total - elsewhere + found.saved_layers + found.saved_rest
    estimate = found.total + (0 if gpu else found.host_state) - libraries
    name = "model state and activations"
    value = f"{format_bytes(certain)}, about {format_bytes(estimate)} with buffers and working memory"
    has = f"{format_bytes(total)} that a rank has here"
    remedy = "use more ranks, a higher zero.stage or parallel.tp; llama-mcore plan layout finds what fits"
    if certain > total:
        return _problem("memory", name, value, f"must be less than the {has}", remedy)
    if estimate > total:
        meaning = f"the second figure, an estimate, exceeds the {has}: the run may run out of memory"
        return Finding("memory", name, "note", value, meaning, remedy, required=True)
    return _ok("memory", name, f"{value}, of the {has}")


def kernels(model: ModelConfig, precision: str, documents: bool) -> list[Finding]:
    """Findings on the attention backend and kernels of this rank's device, or why there are none."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    choices: dict[str, Callable[[], Choice]] = {
        "attention": lambda: attention_for(model, dtype, documents),
        "norms, rotation, SwiGLU": lambda: kernels_for(model.kernels),
    }
    findings = []
    for name, choose in choices.items():
        try:
            findings.append(_ok("kernels", name, str(choose())))
        except ConfigError as error:
            found = error.problems[0]
            findings.append(_problem("kernels", found.field, str(found.value), found.reason, found.remedy))
    return findings


def versions() -> dict[str, str]:
    """Versions on this node, by name: a node with another one may compute something else."""
    return {
        "Python": platform.python_version(),
        **{name: metadata.version(name) for name in PACKAGES},
        "llama_mcore": source_digest(SOURCES),
        "device": device_name(),
        **gpu_library_versions(),
    }


def source_digest(folder: Path) -> str:
    """Digest of all Python files of a folder, since two checkouts of one version may differ."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        try:
            content = read_small_file(path, _LARGEST_SOURCE, follow=True)
        except (OSError, ValueError) as error:
            content = str(error).encode()  # one that cannot be read is a difference too
        digest.update(f"{path.relative_to(folder)} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:12]


def _machine_memory() -> int:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(total, memory_limit() or total)


def _ok(group: str, name: str, value: str) -> Finding:
    return Finding(group, name, "ok", value, required=True)


def _problem(group: str, name: str, value: str, meaning: str, remedy: str) -> Finding:
    return Finding(group, name, "problem", value, meaning, remedy, required=True)
