"""llama_mcore.distributed.cgroup: memory that may still be allocated. What limits it is in test_doctor.py."""

from pathlib import Path

import pytest

from llama_mcore.distributed.cgroup import available_memory

KIB = 1024
NEW = {"membership": "0::/job/step"}
OLD = {"membership": "4:memory:/job\n0::/"}


def available(root: Path, files: dict[str, str], machine_kib: int = 10_000) -> int:
    files = {**files, "meminfo": f"MemTotal: 99999 kB\nMemAvailable: {machine_kib} kB\nHugePages_Free: 0"}
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    return available_memory(root, root / "membership", root / "meminfo")


def group(path: str, limit: object, used: int, cache: int) -> dict[str, str]:
    """Group of version 2."""
    stat = f"anon {used - cache}\ninactive_file {cache}"
    return {
        f"{path}/memory.max": str(limit),
        f"{path}/memory.current": str(used),
        f"{path}/memory.stat": stat,
    }


@pytest.mark.parametrize(
    ("job", "step", "expected"),
    [
        ((5000, 3000, 0), ("max", 3000, 0), 2000),
        ((5000, 3000, 0), (4000, 3000, 0), 1000),
        ((5000, 3000, 500), ("max", 3000, 500), 2500),
        (("max", 3000, 0), ("max", 3000, 0), 10_000 * KIB),
        ((5000, 6000, 0), ("max", 6000, 0), 0),
    ],
)
def test_what_a_group_and_those_above_it_have_left(
    tmp_path: Path, job: tuple, step: tuple, expected: int
) -> None:
    """Page cache counts as free. The root has a memory.stat and no limit."""
    root = {"memory.stat": "anon 1\ninactive_file 99999"}
    assert available(tmp_path, NEW | group("job", *job) | group("job/step", *step) | root) == expected


def test_version_1_has_numbers_of_its_own_names(tmp_path: Path) -> None:
    folder = "memory/job/memory."
    files = {f"{folder}limit_in_bytes": "5000", f"{folder}usage_in_bytes": "3000"}
    stat = {f"{folder}stat": "inactive_file 1\ntotal_inactive_file 500"}
    assert available(tmp_path, OLD | files | stat) == 2500


def test_the_machine_may_have_less(tmp_path: Path) -> None:
    assert available(tmp_path, NEW | group("job", 5000 * KIB, 0, 0), machine_kib=3) == 3 * KIB
    assert available(tmp_path, {"membership": "0::/elsewhere"}, machine_kib=7) == 7 * KIB
