"""Import cost of a command: seconds that it and every process it starts spend importing the large libraries.

    python tests/support/import_times.py python -m pytest

Puts a hook into this environment's site-packages while the command runs and prints a table when it ends.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections import defaultdict
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

LIBRARIES = ("torch", "megatron.core", "deepspeed", "transformers")
LOG = "LLAMA_MCORE_IMPORT_TIMES"
"""Environment variable: the file to which every process appends a line per library."""


class TimedImports:
    """Finder that times the outermost of the libraries: what it imports in turn is part of its time."""

    def __init__(self, log: str) -> None:
        self._log, self._depth = log, 0

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path) if name in LIBRARIES else None  # type: ignore[arg-type]
        if spec and spec.loader:
            execute = spec.loader.exec_module

            def timed(module: ModuleType) -> None:
                started, cpu_started = time.perf_counter(), time.process_time()
                self._depth += 1
                try:
                    execute(module)
                finally:
                    self._depth -= 1
                if not self._depth:
                    self._note(name, time.perf_counter() - started, time.process_time() - cpu_started)

            spec.loader.exec_module = timed  # type: ignore[method-assign]
        return spec

    def _note(self, name: str, wall_s: float, cpu_s: float) -> None:
        with open(self._log, "a") as log:
            log.write(f"{os.getpid()} {name} {wall_s:.3f} {cpu_s:.3f}\n")


def install() -> None:
    sys.meta_path.insert(0, TimedImports(os.environ[LOG]))  # type: ignore[arg-type]


def main(command: list[str]) -> int:
    site_packages = Path(sysconfig.get_path("purelib"))
    module, hook = site_packages / "_llama_mcore_import_times.py", site_packages / "llama_mcore_times.pth"
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")
        log.touch()
        try:
            shutil.copy(__file__, module)
            hook.write_text(f'import os; os.environ.get("{LOG}") and __import__("{module.stem}").install()\n')
            exit_code = subprocess.run(command, env=os.environ | {LOG: str(log)}).returncode
        finally:
            hook.unlink(missing_ok=True)
            module.unlink(missing_ok=True)
        print_table(log.read_text())
    return exit_code


def print_table(log: str) -> None:
    processes, wall, cpu = set(), defaultdict(list), defaultdict(float)
    for line in log.splitlines():
        pid, name, wall_s, cpu_s = line.split()
        processes.add(pid)
        wall[name].append(float(wall_s))
        cpu[name] += float(cpu_s)
    print(f"{len(processes)} processes imported them")
    for name, seconds in wall.items():
        print(f"{name:14} {len(seconds):5} times {sum(seconds):8.1f} s wall {cpu[name]:8.1f} s CPU")
    print(f"{'all':26} {sum(map(sum, wall.values())):8.1f} s wall {sum(cpu.values()):8.1f} s CPU")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
