"""Limits of this machine and this session that bite a run: files, memory, processors, disks."""

import os
import re
import resource
import shutil
import tempfile
from fnmatch import fnmatchcase
from pathlib import Path

from llama_mcore.diagnose.finding import Finding, Status
from llama_mcore.distributed.cgroup import cpu_limit, memory_limit
from llama_mcore.errors import shown

GROUP = "limits"
# A run keeps every file of its datasets open; 1,024 is the usual default.
OPEN_FILES = 4096
# What NVIDIA's guide to NCCL gives containers, whose default is 64 MB.
SHARED_MEMORY = 1 << 30
FREE_SPACE = 1 << 30
MOUNTS = Path("/proc/self/mountinfo")
# Types of file systems, as in MOUNTS, over a network.
SHARED = ("nfs*", "lustre", "gpfs", "beegfs*", "ceph", "wekafs", "panfs", "pvfs2", "afs", "cifs", "fuse.*")
# Those of containers and images are of the node.
LOCAL = ("fuse.fuse-overlayfs", "fuse.squashfuse", "fuse.squashfuse_ll", "fuse.lxcfs")
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


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
    meaning = "a run keeps every file of its datasets open, besides connections"
    return _finding("open files", "problem", _count(limit), meaning, f"ulimit -n {OPEN_FILES} or more")


def locked_memory(limit: int, on_gpu: bool) -> Finding:
    """Only network cards that read memory by themselves need it, which is how NCCL uses InfiniBand."""
    value = "unlimited" if limit == resource.RLIM_INFINITY else _size(limit)
    if limit == resource.RLIM_INFINITY or not on_gpu:
        return _finding("locked memory", "ok", value)
    meaning = "NCCL over InfiniBand locks the memory that it sends from"
    return _finding(
        "locked memory", "problem", value, meaning, "ulimit -l unlimited, or in a container the same"
    )


def shared_memory(size: int | None, on_gpu: bool) -> Finding:
    value = "none" if size is None else _size(size)
    if not on_gpu or (size is not None and size >= SHARED_MEMORY):
        return _finding("/dev/shm", "ok", value)
    meaning = "NCCL between the GPUs of a node goes through it"
    return _finding("/dev/shm", "problem", value, meaning, "give the container 1 GiB or more (--shm-size)")


def memory(total: int, limit: int | None) -> Finding:
    if limit is None or limit >= total:
        return _finding("memory", "ok", _size(total))
    value = f"{_size(limit)} of the machine's {_size(total)}"
    meaning = "the control group ends what takes more, though programs see all of it"
    return _finding(
        "memory", "note", value, meaning, "ask the scheduler or container for more if a run needs it"
    )


def processors(usable: int, present: int, quota: float | None) -> Finding:
    """`usable`: those that this process may run on; `quota`: how many it may keep busy."""
    value = f"{usable} of {present}" if usable < present else f"{present}"
    if quota is None or quota >= usable:
        return _finding("processors", "ok", value)
    threads = max(1, int(quota))
    meaning = "libraries start a thread for each that they see, and the quota then stops all of them at times"
    remedy = f"OMP_NUM_THREADS={threads}, divided by the ranks of a node"
    return _finding("processors", "problem", f"{value}, time for {quota:g}", meaning, remedy)


def huge_pages(path: Path) -> Finding:
    """Conversions ask for them (convert/__init__.py)."""
    text = path.read_text() if path.is_file() else ""
    setting = text.partition("[")[2].partition("]")[0] or "unknown"
    if setting in ("always", "madvise"):
        return _finding("huge pages", "ok", setting)
    meaning = "conversions touch fresh memory in pages of 4 KiB, which takes longer than to copy into it"
    return _finding("huge pages", "note", setting, meaning, f"as root: echo madvise > {path}")


def free_space(name: str, folder: Path) -> Finding:
    free = shutil.disk_usage(folder).free
    value = f"{_size(free)} free in {shown(folder)}"
    if free >= FREE_SPACE:
        return _finding(name, "ok", value)
    return _finding(name, "problem", value, "less than 1 GiB", "make room, or choose another folder")


def compile_cache(folder: Path, mounts: str) -> Finding:
    """The folder of torch.compile. `mounts`: as in MOUNTS."""
    name, value = "compile cache", shown(folder)
    remedy = "TORCHINDUCTOR_CACHE_DIR=FOLDER, on a disk of the node"
    if not _can_be_written(folder):
        return _finding(name, "problem", value, "cannot be written: torch.compile needs it", remedy)
    kind = file_system(folder, mounts)
    if any(fnmatchcase(kind, pattern) for pattern in SHARED) and kind not in LOCAL:
        meaning = f"on a file system over a network ({kind}): ranks of all nodes wait for its locks"
        return _finding(name, "problem", value, meaning, remedy)
    return _finding(name, "ok", value)


def _can_be_written(folder: Path) -> bool:
    """It, or where it would be made."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    return there.is_dir() and os.access(there, os.W_OK | os.X_OK)


def file_system(folder: Path, mounts: str) -> str:
    """The type of that which `folder` lies on, "ext4"; empty where `mounts` has none."""
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
