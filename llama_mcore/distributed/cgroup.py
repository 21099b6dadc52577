"""Limits of the control groups of this process on memory and processor time, often below the machine's.

Linux, Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/. The limits of parent groups apply too.
"""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

ROOT = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")
MEMINFO = Path("/proc/meminfo")


def memory_limit(root: Path = ROOT, membership: Path = MEMBERSHIP) -> int | None:
    """Bytes of memory that the groups allow; None without a limit."""
    # version 1 writes "no limit" as a number close to 2^63
    words = [*_values(root, membership, "memory", "memory.max", "memory.limit_in_bytes")]
    limits = [int(word) for word in words if word.isdigit() and int(word) < 1 << 60]
    return min(limits, default=None)


def available_memory(root: Path = ROOT, membership: Path = MEMBERSHIP, meminfo: Path = MEMINFO) -> int:
    """Bytes that may still be allocated before something is swapped or killed, by the machine and by the
    control groups. Page cache counts as free."""
    machine = _numbers(meminfo.read_text())["MemAvailable:"] << 10
    names = [("max", "limit_in_bytes"), ("current", "usage_in_bytes"), ("stat", "stat")]
    of_groups = zip(
        *(_values(root, membership, "memory", f"memory.{new}", f"memory.{old}") for new, old in names),
        strict=False,  # the root group of version 2 has memory.stat alone
    )
    free = [
        int(limit) - int(used) + _inactive_cache(_numbers(stat))
        for limit, used, stat in of_groups
        if limit.isdigit()
    ]
    return max(0, min([machine, *free]))


def _inactive_cache(stat: dict[str, int]) -> int:
    """Bytes of inactive page cache of a group and its children, for which version 1 has a number of its
    own."""
    return stat.get("total_inactive_file", stat.get("inactive_file", 0))


def _numbers(text: str) -> dict[str, int]:
    """Numbers in lines of the form `name number ...`, by name."""
    return {words[0]: int(words[1]) for words in map(str.split, text.splitlines())}


def cpu_limit(root: Path = ROOT, membership: Path = MEMBERSHIP) -> float | None:
    """Number of processors whose time the groups allow; None without a limit."""
    new = [value.split() for value in _values(root, membership, "cpu", "cpu.max", "cpu.cfs_quota_us")]
    periods = [*_values(root, membership, "cpu", "cpu.max", "cpu.cfs_period_us")]
    # version 2 has quota and period in one file, version 1 a file of each
    pairs = [
        words if len(words) == 2 else [*words, period] for words, period in zip(new, periods, strict=False)
    ]
    shares = [int(quota) / int(period) for quota, period in pairs if quota.isdigit() and period.isdigit()]
    return min(shares, default=None)


def _values(root: Path, membership: Path, controller: str, new: str, old: str) -> Iterator[str]:
    """Contents of the file `new` (version 2) or `old` in this process's groups and their parents."""
    for line in membership.read_text().splitlines() if membership.is_file() else []:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        folder, name = (root / controller, old) if controllers else (root, new)
        for group in (PurePosixPath(path), *PurePosixPath(path).parents):
            file = folder / str(group).lstrip("/") / name
            if file.is_file():
                yield file.read_text().strip()
