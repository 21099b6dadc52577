"""Fixtures of all tests, and the rules of their tiers and of the order in which several workers take them."""

import hashlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Before torch or DeepSpeed is imported: tests run on the CPU whatever the machine has, unless marked gpu.
os.environ["LLAMA_MCORE_DEVICE"] = "cpu"
os.environ["DS_ACCELERATOR"] = "cpu"

import numpy as np
import pytest
from filelock import FileLock
from hypothesis import settings

from tests.support.models import Small, write_tokens
from tests.support.product import train
from tests.support.text import corpus, tokenizer_model  # noqa: F401  fixtures

# A crowded machine is no reason to fail.
settings.register_profile("llama_mcore", deadline=None)
settings.load_profile("llama_mcore")

PACKAGE = Path(__file__).parents[1] / "llama_mcore"
SOURCES = ("cli/plan.py", "config/load.py", "config/checks.py", "errors.py", "generate/generate.py")
STARTS_A_PROCESS = {"subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.system", "world.Call"}
Once = Callable[[str, Callable[[Path], object]], Path]

_running: pytest.Item | None = None


def pytest_configure() -> None:
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        # a shell's background job ignores Ctrl-C, and so would the programs that tests interrupt
        signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.addaudithook(_refuse_unmarked_process)


def _refuse_unmarked_process(event: str, _: Any) -> None:
    """Keeps `make test-fast` what it says: only tests marked `process` start one."""
    if event in STARTS_A_PROCESS and _running and not _running.get_closest_marker("process"):
        pytest.fail(f"{_running.nodeid} starts a process ({event}): mark it `process`")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    global _running
    _running = item
    try:
        return (yield)
    finally:
        _running = None


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """One xdist group a module, as its tests share what its fixtures make. Those that start processes come
    first, and of these the waiting ones are spread among those that compute, so that all cores are busy."""
    modules: dict[str, list[pytest.Item]] = {}
    for item in items:
        module = item.nodeid.partition("::")[0]
        modules.setdefault(module, []).append(item)
        if not item.get_closest_marker("xdist_group"):
            item.add_marker(pytest.mark.xdist_group(module))
    kinds: dict[str, list[list[pytest.Item]]] = {"wait": [], "process": [], "": []}
    for tests in modules.values():
        marks = [mark for mark in ("wait", "process") if any(test.get_closest_marker(mark) for test in tests)]
        kinds[marks[0] if marks else ""].append(tests)
    items[:] = [test for tests in _spread(kinds["wait"], kinds["process"]) + kinds[""] for test in tests]


def _spread(few: list[Any], many: list[Any]) -> list[Any]:
    """Both lists in their order, the places of one evenly among those of the other."""
    places = [((n + 0.5) / len(part), one) for part in (few, many) for n, one in enumerate(part)]
    return [one for _, one in sorted(places, key=lambda place: place[0])]


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Once:
    """once(name, make): the folder of this name, which `make(folder)` has filled once for all workers. Where
    that failed, it fails everywhere."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base

    def folder_of(name: str, make: Callable[[Path], object]) -> Path:
        folder, done, failed = (shared / f"once-{name}{suffix}" for suffix in ("", ".done", ".failed"))
        with FileLock(f"{folder}.lock"):
            if failed.exists():
                pytest.fail(failed.read_text(), pytrace=False)
            if not done.exists():
                folder.mkdir()
                try:
                    make(folder)
                except BaseException as error:
                    failed.write_text(f"{name}: {error}")
                    raise
                done.touch()
        return folder

    return folder_of


@pytest.fixture(scope="session")
def small(once: Once) -> Small:
    """The bytes of the package's own sources as tokens: real text without a tokenizer."""

    def write(folder: Path) -> None:
        validation, *rest = (np.frombuffer((PACKAGE / name).read_bytes(), np.uint8) for name in SOURCES)
        write_tokens(folder / "valid", [validation[:8192]])  # all of it is read at the end of each run
        write_tokens(folder / "train", rest)

    folder = once("small", write)
    return Small(folder / "train", folder / "valid")


@pytest.fixture(scope="session")
def uninterrupted(once: Once, small: Small) -> Callable[..., Path]:
    """uninterrupted(settings): the folder of a run of `small` on two ranks that was left alone, with these
    overrides; once for all tests that compare with it."""

    def run_dir(settings: list[str], ranks: int = 2) -> Path:
        def run(folder: Path) -> None:
            done = train([*small.overrides(folder / "run"), *settings], ranks=ranks)
            assert done.exit_codes == [0] * ranks, done.output

        digest = hashlib.sha256("\n".join([str(ranks), *settings]).encode()).hexdigest()[:12]
        return once(f"uninterrupted-{digest}", run) / "run"

    return run_dir
