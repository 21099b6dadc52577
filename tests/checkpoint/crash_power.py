"""States that a power cut can leave of two ranks' saves, and what a run would resume from.

Every operation of real saves is recorded with its content. After each of them the power may fail: content
that was not fsynced is there, torn, zero or absent; of the names whose folder was not fsynced, any may be
missing. Every such state is made in a folder and read by what reads checkpoints. A kill cannot show this: it
leaves what the system still has in memory. What is found are the violations, then those that show without a
single fsync, with a changed order and without a hash check, each of which must have some.
"""

import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from hashlib import sha256
from itertools import product, takewhile
from pathlib import Path
from typing import Any

from llama_mcore.checkpoint.paths import (
    LATEST,
    MANIFEST,
    REPLACED,
    TEMPORARY,
    checkpoints_dir,
    rank_file,
    step_dir,
)
from llama_mcore.checkpoint.start import Start
from llama_mcore.distributed.config import ParallelConfig
from llama_mcore.distributed.groups import Groups, process_groups
from llama_mcore.errors import LlamaMcoreError
from llama_mcore.observe.log import NAME
from llama_mcore.observe.phases import Phases
from llama_mcore.train.resume import find_start
from tests.checkpoint.crash_run import RANKS, SAVES, Rank, Save, joined, run_config, version_of, watched
from tests.checkpoint.damage import edit_manifest
from tests.support.world import run_ranks

RUN = Path("new/run")
"""Two folders that the first save makes."""
NO_CHECKPOINT, REFUSED, MIXED = 0, -1, -2

State = dict[str, bytes | None]
"""Path -> content; None for a folder."""


@dataclass(frozen=True)
class Operation:
    at: int
    """Nanoseconds of the machine's clock."""
    kind: str
    """create, write, fsync, mkdir, rename, remove, acknowledge."""
    path: str
    """Relative to the folder that is recorded; of `acknowledge` the version."""
    to: str = ""
    content: bytes = b""
    """Content of a write."""


Log = list[Operation]


@dataclass
class Found:
    states: int
    """Number of states of the disk that were checked."""
    violations: list[str]
    fsyncs: dict[str, list[str]]
    """Violations without a single fsync."""
    orders: dict[str, list[str]]
    checks: dict[str, dict[str, int]]


def cut_power(folder: Path, saves: list[Save]) -> Found:
    log = record(folder / "recorded", saves)
    record(folder / "sound", saves[:1])
    logging.getLogger(NAME).addHandler(logging.NullHandler())  # else each state would print what is damaged
    return look(folder, log, len(saves))


def look(folder: Path, log: Log, saves: int) -> Found:
    with process_groups(ParallelConfig(), seed=0) as groups:
        checker = Checker(folder / "states", groups)
        found = Found(
            states=0,
            violations=checker.violations(log),
            fsyncs={
                f"{number}: {log[number].path}": checker.violations(log[:number] + log[number + 1 :], until=1)
                for number in significant_fsyncs(log)
            },
            orders={
                name: checker.violations(of_each_publication(log, change), until=1)
                for name, (least, change) in ORDERS.items()
                if saves >= least
            },
            checks={name: checked(folder / "sound", name, checker) for name in CHECKS},
        )
        found.states = len(checker.known)
        return found


# Recording


def record(folder: Path, saves: list[Save]) -> Log:
    """The operations of both ranks in the order of the clock, consecutive writes of a file as one."""
    folder.mkdir()

    def job() -> Log:
        with joined() as groups, recording(folder) as operations:
            rank = Rank(folder / RUN, groups)
            for step, version in saves:
                rank.save(step, version)
                operations.append(Operation(time.monotonic_ns(), "acknowledge", str(version)))
        return together(operations)

    logs = run_ranks(RANKS, job)
    return sorted((operation for log in logs for operation in log), key=lambda operation: operation.at)


def together(log: Log) -> Log:
    found: Log = []
    for operation in log:
        if found and operation.kind == found[-1].kind == "write" and operation.path == found[-1].path:
            found[-1] = replace(operation, content=found[-1].content + operation.content)
        else:
            found.append(operation)
    return found


@contextmanager
def recording(folder: Path) -> Iterator[Log]:
    """Log of what this process does in `folder`, with the calls that make something durable."""
    operations: Log = []
    write, fsync, rename = os.write, os.fsync, Path.rename

    def note(kind: str, path: Path, to: str = "", content: bytes = b"") -> None:
        if path.is_relative_to(folder):
            relative = str(path.relative_to(folder))
            operations.append(Operation(time.monotonic_ns(), kind, relative, to, content))

    def path_of(descriptor: int) -> Path:
        return Path(f"/proc/self/fd/{descriptor}").readlink()

    def noting_write(descriptor: int, content: memoryview) -> int:
        written = write(descriptor, content)
        note("write", path_of(descriptor), content=bytes(content[:written]))
        return written

    def noting_fsync(descriptor: int) -> None:
        fsync(descriptor)
        note("fsync", path_of(descriptor))

    def noting_rename(path: Path, to: Path) -> Path:
        note("rename", path, to=str(to.relative_to(folder)))
        return rename(path, to)

    def watch(operation: str, path: Path) -> None:
        if operation in ("create", "mkdir", "remove"):
            note(operation, path)

    os.write, os.fsync, Path.rename = noting_write, noting_fsync, noting_rename  # type: ignore
    try:
        with watched(watch):
            yield operations
    finally:
        os.write, os.fsync, Path.rename = write, fsync, rename  # type: ignore


# The model of the disk


@dataclass
class File:
    content: bytes = b""
    durable: bytes = b""

    def after_a_power_cut(self) -> list[bytes]:
        if self.content == self.durable:
            return [self.content]
        torn = self.content[: len(self.content) // 2]
        zero = self.durable + bytes(len(self.content) - len(self.durable))
        return [self.content, torn, zero, self.durable]


Entries = dict[str, "File | Folder"]


@dataclass
class Folder:
    entries: Entries = field(default_factory=dict)
    durable: Entries = field(default_factory=dict)
    pending: list[Callable[[Entries], object]] = field(default_factory=list)

    def change(self, change: Callable[[Entries], object]) -> None:
        change(self.entries)
        self.pending.append(change)

    def after_a_power_cut(self) -> list[Entries]:
        """The durable names with some of the changes since, as far as these are possible without the others:
        any of a few; of many, those up to some moment, or all but one."""
        found, count = [], len(self.pending)
        few = product((True, False), repeat=count) if count <= 3 else ()
        first = ([number < end for number in range(count)] for end in range(count + 1))
        but_one = ([number != left_out for number in range(count)] for left_out in range(count))
        for chosen in few or (*first, *but_one):
            entries = dict(self.durable)
            try:
                for change, happened in zip(self.pending, chosen, strict=True):
                    if happened:
                        change(entries)
            except KeyError:
                continue
            found.append(entries)
        return found


class Disk:
    def __init__(self) -> None:
        self.root = Folder()

    def at(self, path: str) -> Any:
        node: Any = self.root
        for part in Path(path).parts:
            node = node.entries[part]
        return node

    def apply(self, operation: Operation) -> None:
        path = Path(operation.path)
        match operation.kind:
            case "create":
                self.parent(path).change(adding(path.name, File()))
            case "mkdir":
                self.make_folders(path)
            case "write":
                self.at(operation.path).content += operation.content
            case "fsync":
                self.sync(self.at(operation.path))
            case "rename":
                assert Path(operation.to).parent == path.parent
                self.parent(path).change(renaming(path.name, Path(operation.to).name))
            case "remove":
                self.remove(path)

    def parent(self, path: Path) -> Folder:
        return self.at(str(path.parent))

    def make_folders(self, path: Path) -> None:
        for folder in [*reversed(path.parents[:-1]), path]:
            parent = self.parent(folder)
            if folder.name not in parent.entries:
                parent.change(adding(folder.name, Folder()))

    def remove(self, path: Path) -> None:
        folder = self.parent(path).entries.get(path.name)
        if isinstance(folder, Folder):
            for name in list(folder.entries):
                folder.change(removing(name))
            self.parent(path).change(removing(path.name))

    @staticmethod
    def sync(node: File | Folder) -> None:
        if isinstance(node, File):
            node.durable = node.content
        else:
            node.durable, node.pending = dict(node.entries), []

    def states(self) -> Iterator[State]:
        """States after a power cut. Of several files that were not fsynced, all suffer alike, or
        one alone does."""
        files = [node for node in nodes(self.root) if isinstance(node, File) and node.content != node.durable]
        suffering = [[]] + [[file] for file in files] + ([files] if len(files) > 1 else [])
        folders = [node for node in nodes(self.root) if isinstance(node, Folder) and node.pending]
        contents = [
            {id(file): file.after_a_power_cut()[how] for file in victims}
            for victims in suffering
            for how in (range(1, 4) if victims else (0,))
        ]
        for entries in product(*(folder.after_a_power_cut() for folder in folders)):
            names = {id(folder): chosen for folder, chosen in zip(folders, entries, strict=True)}
            for lost in contents:
                yield dict(tree(self.root, Path(), names, lost))


def adding(name: str, node: File | Folder) -> Callable[[Entries], object]:
    return lambda entries: entries.__setitem__(name, node)


def removing(name: str) -> Callable[[Entries], object]:
    return lambda entries: entries.pop(name)


def renaming(name: str, to: str) -> Callable[[Entries], object]:
    return lambda entries: entries.__setitem__(to, entries.pop(name))


def nodes(folder: Folder) -> Iterator[File | Folder]:
    """All that can come back: also what was renamed or removed and is not durably gone."""
    yield folder
    kept = {id(node): node for node in (*folder.entries.values(), *folder.durable.values())}
    for node in kept.values():
        if isinstance(node, Folder):
            yield from nodes(node)
        else:
            yield node


def tree(
    folder: Folder, path: Path, names: dict[int, Entries], contents: dict[int, bytes]
) -> Iterator[tuple[str, bytes | None]]:
    for name, node in names.get(id(folder), folder.entries).items():
        if isinstance(node, File):
            yield str(path / name), contents.get(id(node), node.content)
        else:
            yield str(path / name), None
            yield from tree(node, path / name, names, contents)


# The check


class Checker:
    """Makes states and says which break the promise; knows those that it has seen."""

    def __init__(self, folder: Path, groups: Groups) -> None:
        self.known: dict[frozenset, int] = {}
        self._folder, self._groups = folder, groups

    def violations(self, log: Log, until: int = 1000) -> list[str]:
        """Violations by a power cut after each operation of the log; at most `until`."""
        disk, acknowledged, found = Disk(), 0, []
        for number, operation in enumerate(log):
            if operation.kind == "acknowledge":
                acknowledged = max(acknowledged, int(operation.path))
            else:
                disk.apply(operation)
            for state in disk.states():
                version = self.version_in(state)
                if version not in (acknowledged, acknowledged + 1) or not hint_is_whole(state):
                    where = f"operation {number}, {operation.kind} {operation.path}"
                    names = {path: content and len(content) for path, content in state.items()}
                    found.append(f"after {where}: {acknowledged} acknowledged, {version} found in {names}")
                    if len(found) >= until:
                        return found
        return found

    def version_in(self, state: State) -> int:
        key = frozenset(state.items())
        if key not in self.known:
            shutil.rmtree(self._folder, ignore_errors=True)
            make(self._folder, state)
            self.known[key] = self.version_at(self._folder / RUN)
        return self.known[key]

    def version_at(self, run_dir: Path) -> int:
        try:
            found = find_start(run_config(run_dir), Start(), self._groups, Phases())
            return version_of(found.reader) if found.reader else NO_CHECKPOINT
        except LlamaMcoreError:
            return REFUSED
        except AssertionError:
            return MIXED


def make(folder: Path, state: State) -> None:
    folder.mkdir()
    for path, content in state.items():
        if content is None:
            (folder / path).mkdir()
        else:
            (folder / path).write_bytes(content)


def hint_is_whole(state: State) -> bool:
    hint = state.get(str(checkpoints_dir(RUN) / LATEST))
    return hint is None or hint.decode() in {f"{step_dir(RUN, step).name}\n" for step, _ in SAVES}


def significant_fsyncs(log: Log) -> list[int]:
    """Fsyncs that made something durable; before the others everything already was."""
    disk, found = Disk(), []
    for number, operation in enumerate(log):
        if operation.kind == "fsync":
            node = disk.at(operation.path)
            if node.pending if isinstance(node, Folder) else node.content != node.durable:
                found.append(number)
        if operation.kind != "acknowledge":
            disk.apply(operation)
    return found


# With something taken away


def of_each_publication(log: Log, change: Callable[[Log], Log]) -> Log:
    """The log with what happens from the manifest to the acknowledgement of each save changed."""
    found: Log = []
    while starts := [number for number, each in enumerate(log) if is_of_manifest(each)]:
        start = starts[0]
        end = next(n for n, each in enumerate(log) if n > start and each.kind == "acknowledge")
        found += [*log[:start], *change(log[start:end])]
        log = log[end:]
    return found + log


def is_of_manifest(operation: Operation) -> bool:
    return Path(operation.path).name == MANIFEST


def publishing(log: Log) -> int:
    """Number of the rename that gives a checkpoint its name."""
    (number,) = (
        number
        for number, operation in enumerate(log)
        if operation.kind == "rename" and operation.path == f"{operation.to}{TEMPORARY}"
    )
    return number


def manifest_late(log: Log) -> Log:
    final = log[publishing(log)].to
    late = [replace(each, path=f"{final}/{MANIFEST}") for each in log if is_of_manifest(each)]
    others = [each for each in log if not is_of_manifest(each)]
    after = publishing(others) + 1
    return [*others[:after], *late, Operation(0, "fsync", final), *others[after:]]


def names_early(log: Log) -> Log:
    number = publishing(log)
    names = list(takewhile(lambda each: each.kind == "fsync", log[number + 1 :]))
    return [*log[:number], *names, log[number], *log[number + 1 + len(names) :]]


def removal_early(log: Log) -> Log:
    hint = next(number for number, each in enumerate(log) if Path(each.path).name == f".{LATEST}.tmp")
    return log[hint:] + log[:hint]


def earlier_removed(log: Log) -> Log:
    changed: Log = []
    for each in log:
        if each.to.endswith(REPLACED):
            doomed = str(Path(each.to).with_suffix(f".removed{TEMPORARY}"))
            changed += [replace(each, to=doomed), Operation(0, "remove", doomed)]
        elif not each.path.endswith(REPLACED):
            changed.append(each)
    return changed


ORDERS: dict[str, tuple[int, Callable[[Log], Log]]] = {
    "manifest after the rename": (1, manifest_late),
    "names made durable before the rename": (1, names_early),
    "old ones removed before the rename": (2, removal_early),
    "the step's earlier checkpoint removed first": (3, earlier_removed),
}
"""Number of saves that show it, and the way to make it."""


def lose_a_page(folder: Path) -> None:
    path = folder / rank_file(1)
    path.write_bytes(path.read_bytes()[:-4096] + bytes(4096))


def take_its_hash(folder: Path) -> None:
    found = sha256((folder / rank_file(1)).read_bytes()).hexdigest()
    edit_manifest(folder, lambda manifest: manifest["files"][1].update(sha256=found))


def change_the_manifest(folder: Path) -> None:
    content = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(content | {"consumed_samples": 2}))


def seal(folder: Path) -> None:
    edit_manifest(folder, lambda manifest: None)


CHECKS = {
    "hashes of the files": (lose_a_page, take_its_hash),
    "hash of the manifest": (change_the_manifest, seal),
}
"""The damage by a disk that lost acknowledged writes, and the change that makes the hash fit."""


def checked(sound: Path, name: str, checker: Checker) -> dict[str, int]:
    """Results after the damage, and after the hash was made to fit it."""
    damage, make_fit = CHECKS[name]
    folder = shutil.copytree(sound, sound.with_name(name))
    checkpoint = step_dir(folder / RUN, SAVES[0][0])
    damage(checkpoint)
    found = {"damaged": checker.version_at(folder / RUN)}
    make_fit(checkpoint)
    return found | {"with its hash": checker.version_at(folder / RUN)}
