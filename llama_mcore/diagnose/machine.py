"""Limits of this machine and session that a run may hit (files, memory, processors, disks), and environment
variables that change a run. Loads no torch."""

import os
import re
import resource
import shutil
import tempfile
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path

from llama_mcore.diagnose.finding import Finding, Status
from llama_mcore.distributed.cgroup import cpu_limit, memory_limit
from llama_mcore.errors import shown

GROUP = "limits"
# A run keeps every file of its datasets open; 1,024 is the usual limit.
OPEN_FILES = 4096
# As in NVIDIA's guide to NCCL in containers, whose default is 64 MB.
SHARED_MEMORY = 1 << 30
FREE_SPACE = 1 << 30
MOUNTS = Path("/proc/self/mountinfo")
# Types of network file systems, as in MOUNTS.
SHARED = ("nfs*", "lustre", "gpfs", "beegfs*", "ceph", "wekafs", "panfs", "pvfs2", "afs", "cifs", "fuse.*")
# These, of containers and images, are the node's own.
LOCAL = ("fuse.fuse-overlayfs", "fuse.squashfuse", "fuse.squashfuse_ll", "fuse.lxcfs")
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")

# Pattern -> status when set, and its effect. The first that matches counts.
VARIABLES: dict[str, tuple[Status, str]] = {
    "LLAMA_MCORE_DEVICE": ("note", "is run.device of runs that leave it auto; cpu leaves all GPUs alone"),
    "CUDA_VISIBLE_DEVICES": (
        "note",
        "a run sees these GPUs only; empty or -1 hides all, and it runs on the CPU",
    ),
    "CUDA_DEVICE_MAX_CONNECTIONS": (
        "note",
        "overrides our choice: 1 with tensor parallelism, the driver's default with ZeRO-3, which 1 slows",
    ),
    "CUDA_LAUNCH_BLOCKING": ("problem", "the CPU waits for every kernel: set it for debugging only"),
    "OMP_NUM_THREADS": ("note", "overrides our choice, which shares the cores among the ranks of a node"),
    "NCCL_P2P_DISABLE": ("problem", "GPUs of a node cannot copy to each other directly"),
    "NCCL_SHM_DISABLE": ("problem", "GPUs of a node that cannot copy directly use the network"),
    "NCCL_IB_DISABLE": ("problem", "nodes communicate over IP sockets instead of InfiniBand"),
    "NCCL_*": ("note", "is read by NCCL when a run starts"),
    "GLOO_*": ("note", "is read by gloo when a run starts"),
    "PYTORCH_NO_CUDA_MEMORY_CACHING": ("problem", "every tensor is allocated by the driver"),
    "PYTORCH_*": ("note", "is read by torch: its allocator and its fallbacks"),
    "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": (
        "problem",
        "torch.load in other libraries runs code that a file contains",
    ),
    "TORCH_FORCE_*": ("note", "changes what torch.load accepts in other libraries"),
    "TORCH_COMPILE_DISABLE": ("problem", "model.kernels=compile then runs the plain functions"),
    "TORCHDYNAMO_DISABLE": ("problem", "model.kernels=compile then runs the plain functions"),
    "TORCH_*": ("note", "is read by torch"),
    "TORCHINDUCTOR_*": ("note", "is read by torch.compile"),
    "TRITON_*": ("note", "is read by Triton, which torch.compile uses on a GPU"),
    "CUBLAS_WORKSPACE_CONFIG": ("note", "overrides our choice with run.deterministic"),
    "CC": ("note", "is the C compiler of Triton"),
    "CXX": ("note", "is the C++ compiler of torch.compile on a CPU"),
    "RANK": (
        "note",
        "is set by a launcher; if left over from another, a run waits for ranks that never come",
    ),
}
SWITCHED_OFF = ("", "0")


def limits(on_gpu: bool) -> list[Finding]:
    return [
        open_files(resource.getrlimit(resource.RLIMIT_NOFILE)[0]),
        locked_memory(resource.getrlimit(resource.RLIMIT_MEMLOCK)[0], on_gpu),
        shared_memory(_size_of(Path("/dev/shm")), on_gpu),
        memory(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), memory_limit()),
        processors(len(os.sched_getaffinity(0)), os.cpu_count() or 1, cpu_limit()),
        huge_pages(HUGE_PAGES),
        free_space("current folder", Path.cwd()),
        free_space("temporary folder", Path(tempfile.gettempdir())),
    ]


def open_files(limit: int) -> Finding:
    if limit == resource.RLIM_INFINITY or limit >= OPEN_FILES:
        return _finding("open files", "ok", _count(limit))
    meaning = "a run keeps every file of its datasets open, and its connections"
    return _finding("open files", "problem", _count(limit), meaning, f"ulimit -n {OPEN_FILES} or more")


def locked_memory(limit: int, on_gpu: bool) -> Finding:
    """Finding on the limit of locked memory, which network cards need that read memory by themselves."""
    value = "unlimited" if limit == resource.RLIM_INFINITY else _size(limit)
    if limit == resource.RLIM_INFINITY or not on_gpu:
        return _finding("locked memory", "ok", value)
    meaning = "NCCL over InfiniBand locks the memory that it sends from, and fails above the limit"
    return _finding(
        "locked memory", "problem", value, meaning, "ulimit -l unlimited; for a container --ulimit memlock=-1"
    )


def shared_memory(size: int | None, on_gpu: bool) -> Finding:
    value = "none" if size is None else _size(size)
    if not on_gpu or (size is not None and size >= SHARED_MEMORY):
        return _finding("/dev/shm", "ok", value)
    meaning = "NCCL between the GPUs of a node uses it, and fails when it is full"
    return _finding("/dev/shm", "problem", value, meaning, "give the container at least 1 GiB (--shm-size)")


def memory(total: int, limit: int | None) -> Finding:
    if limit is None or limit >= total:
        return _finding("memory", "ok", _size(total))
    value = f"{_size(limit)} of the machine's {_size(total)}"
    meaning = "the control group kills a process that takes more, although programs see all of it"
    remedy = "request more from the scheduler or container if a run needs it"
    return _finding("memory", "note", value, meaning, remedy)


def processors(usable: int, present: int, quota: float | None) -> Finding:
    """Finding on the processors: `usable` ones may run this process, which may keep `quota` of them busy."""
    value = f"{usable} of {present}" if usable < present else f"{present}"
    if quota is None or quota >= usable:
        return _finding("processors", "ok", value)
    threads = max(1, int(quota))
    meaning = (
        "libraries start a thread for each that they see, and the quota then pauses all of them at times"
    )
    remedy = f"OMP_NUM_THREADS={threads}, divided by the ranks of a node"
    return _finding("processors", "problem", f"{value}, time for {quota:g}", meaning, remedy)


def huge_pages(path: Path) -> Finding:
    """Finding on huge pages, which conversions request (convert/__init__.py)."""
    text = path.read_text() if path.is_file() else ""
    setting = text.partition("[")[2].partition("]")[0] or "unknown"
    if setting in ("always", "madvise"):
        return _finding("huge pages", "ok", setting)
    meaning = "conversions touch new memory in pages of 4 KiB, which takes longer than copying into it"
    return _finding("huge pages", "note", setting, meaning, f"as root: echo madvise > {path}")


def free_space(name: str, folder: Path) -> Finding:
    free = shutil.disk_usage(folder).free
    value = f"{_size(free)} free in {shown(folder)}"
    if free >= FREE_SPACE:
        return _finding(name, "ok", value)
    return _finding(name, "problem", value, "less than 1 GiB", "free space, or use another folder")


def compile_cache(folder: Path, mounts: str) -> Finding:
    """Finding on the folder of torch.compile's cache. `mounts`: content of MOUNTS."""
    name, value = "compile cache", shown(folder)
    remedy = "TORCHINDUCTOR_CACHE_DIR=FOLDER, on a disk of the node"
    if not _can_be_written(folder):
        return _finding(name, "problem", value, "cannot be written, and torch.compile needs it", remedy)
    kind = file_system(folder, mounts)
    if any(fnmatchcase(kind, pattern) for pattern in SHARED) and kind not in LOCAL:
        meaning = f"is on a network file system ({kind}), for whose locks the ranks of all nodes wait"
        return _finding(name, "problem", value, meaning, remedy)
    return _finding(name, "ok", value)


def _can_be_written(folder: Path) -> bool:
    """True if a folder, or the parent in which it would be made, can be written."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    return there.is_dir() and os.access(there, os.W_OK | os.X_OK)


def file_system(folder: Path, mounts: str) -> str:
    """Type of the file system of `folder`, e.g. "ext4"; "" where `mounts` does not tell."""
    folder, found = folder.resolve(), ("", "")
    for line in mounts.splitlines():
        before, _, after = line.partition(" - ")
        point = re.sub(r"\\(\d{3})", lambda octal: chr(int(octal[1], 8)), before.split()[4])
        if folder.is_relative_to(point) and len(point) >= len(found[0]):  # the later hides the earlier
            found = point, after.split()[0]
    return found[1]


def _finding(name: str, status: Status, value: str, meaning: str = "", remedy: str = "") -> Finding:
    return Finding(GROUP, name, status, value, meaning, remedy)


def _count(limit: int) -> str:
    return "unlimited" if limit == resource.RLIM_INFINITY else f"{limit:,}"


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 1 << 30 else f"{count / 2**20:.1f} MiB"


def _size_of(folder: Path) -> int | None:
    return shutil.disk_usage(folder).total if folder.is_dir() else None


def environment(variables: Mapping[str, str]) -> list[Finding]:
    """Findings on the variables that are set and change a run; a single one if there are none."""
    findings = [finding for name in sorted(variables) if (finding := _on_variable(name, variables[name]))]
    return findings or [Finding("environment", "variables", "ok", "none is set that changes a run")]


def _on_variable(name: str, value: str) -> Finding | None:
    known = next((pattern for pattern in VARIABLES if fnmatchcase(name, pattern)), None)
    if known is None:
        return None
    status, meaning = VARIABLES[known]
    if status == "problem" and value in SWITCHED_OFF:
        status = "note"
    remedy = f"unset {name}" if status == "problem" else ""
    return Finding("environment", name, status, shown(value) or "(empty)", meaning, remedy)
