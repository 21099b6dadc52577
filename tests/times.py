"""Breakdown of the suite's time: seconds by module, and time spent importing the large libraries.

    python tests/times.py [PYTEST_OPTION ...]            or        make test-times

Runs pytest with these options and prints two Markdown tables. Imports are counted by a hook in site-packages,
which is there as long as the run lasts.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

LIBRARIES = ("torch", "megatron.core", "deepspeed", "transformers")
LOG = "LLAMA_MCORE_IMPORT_TIMES"
"""Environment variable: the file to which every process appends a line per library."""
MODULES_SHOWN = 40


class TimedImports:
    """Finder that times the outermost of the libraries: what it imports in turn is part of its time."""

    def __init__(self, log: str) -> None:
        self._log, self._depth = log, 0

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path) if name in LIBRARIES else None  # type: ignore[arg-type]
        if spec and spec.loader:
            execute = spec.loader.exec_module

            def timed(module: ModuleType) -> None:
                wall, cpu = time.perf_counter(), time.process_time()
                self._depth += 1
                try:
                    execute(module)
                finally:
                    self._depth -= 1
                if not self._depth:
                    self._note(name, time.perf_counter() - wall, time.process_time() - cpu)

            spec.loader.exec_module = timed  # type: ignore[method-assign]
        return spec

    def _note(self, name: str, wall_s: float, cpu_s: float) -> None:
        with open(self._log, "a") as log:
            log.write(f"{os.getpid()} {name} {wall_s:.3f} {cpu_s:.3f}\n")


def install() -> None:
    """Called by every process of the run when it starts."""
    sys.meta_path.insert(0, TimedImports(os.environ[LOG]))  # type: ignore[arg-type]


@contextmanager
def hook_in_site_packages() -> Iterator[None]:
    site_packages = Path(sysconfig.get_path("purelib"))
    module, hook = site_packages / "_llama_mcore_times.py", site_packages / "llama_mcore_times.pth"
    try:
        shutil.copy(__file__, module)
        hook.write_text(f'import os; os.environ.get("{LOG}") and __import__("{module.stem}").install()\n')
        yield
    finally:
        hook.unlink(missing_ok=True)
        module.unlink(missing_ok=True)


def main(options: list[str]) -> int:
    with tempfile.TemporaryDirectory() as folder:
        log, report = Path(folder, "imports"), Path(folder, "report.xml")
        log.touch()
        command = [sys.executable, "-m", "pytest", f"--junit-xml={report}", *options]
        with hook_in_site_packages():
            exit_code = subprocess.run(command, env=os.environ | {LOG: str(log)}).returncode
        print_modules(report)
        print_imports(log.read_text())
    return exit_code


def print_modules(report: Path) -> None:
    seconds: Counter[str] = Counter()
    tests: Counter[str] = Counter()
    for case in ElementTree.parse(report).iter("testcase"):
        seconds[case.attrib["classname"]] += float(case.attrib["time"])  # type: ignore[assignment]
        tests[case.attrib["classname"]] += 1
    print("\n| module | tests | s |\n|---|---|---|")
    for module, spent in seconds.most_common(MODULES_SHOWN):
        print(f"| {module.removeprefix('tests.')} | {tests[module]} | {spent:.1f} |")
    print(f"| all {len(seconds)} | {tests.total()} | {seconds.total():.1f} |")


def print_imports(log: str) -> None:
    wall, cpu = defaultdict(list), defaultdict(float)
    for line in log.splitlines():
        _, name, wall_s, cpu_s = line.split()
        wall[name].append(float(wall_s))
        cpu[name] += float(cpu_s)
    print("\n| import | times | s | CPU s |\n|---|---|---|---|")
    for name, each in wall.items():
        print(f"| {name} | {len(each)} | {sum(each):.1f} | {cpu[name]:.1f} |")
    processes = len({line.split()[0] for line in log.splitlines()})
    print(
        f"| all, in {processes} processes | | {sum(map(sum, wall.values())):.1f} | {sum(cpu.values()):.1f} |"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
