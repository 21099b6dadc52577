"""Break the saves of two ranks in every way, then see what a run would resume from and save again."""

import ctypes
import errno
import os
import random
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist

from llama_mcore.checkpoint.paths import MANIFEST, checkpoints_dir, rank_file, step_dir
from llama_mcore.errors import OutputError
from tests.checkpoint.crash_run import LAST, RANKS, SAVES, Rank, Save, Watch, joined, names_in, watched
from tests.checkpoint.damage import edit_manifest
from tests.support.world import exit_codes_of, run_ranks

T = TypeVar("T")

CLONE_NEWNS = 0x00020000  # sched.h
PAGE = 4096
CASES_AN_ATTEMPT = 200
EVERYTHING: Mapping[str, int] = {}
SAMPLE = {"kills": 12, "errors": 30, "strace": 5}
"""Number of faults of each kind; all of a kind that is not named."""

Break = Callable[[Rank], AbstractContextManager[Callable[[], bool]]]
"""Breaks something of a rank for as long as the context lasts, which gives whether it has come to that."""


@dataclass
class Case:
    fault: str
    rank: int
    where: str
    """The operation that failed."""
    fired: bool = False
    acknowledged: int = 0
    said: list[str] = field(default_factory=list)
    """Message of each rank whose save failed."""
    found: int = -1
    """Version that a run would resume from."""
    after: int = -1
    """Version that it would resume from after one more save."""
    names: list[str] = field(default_factory=list)
    """Names that the save left in the folder of checkpoints."""


@dataclass
class Tried:
    cases: dict[str, list[Case] | str]
    """Count of each kind of fault; or the reason why it cannot be made here."""
    retention: tuple[int, list[str]]
    """Version found, and names, where newer checkpoints are damaged."""
    among_others: tuple[list[list[str]], str]
    """Names after each of three saves, and what the second said, where there are checkpoints that the run has
    not written."""


def try_all(folder: Path, counts: Mapping[str, int]) -> Tried:
    operations = run_ranks(RANKS, undisturbed, folder)
    cases = {
        job.__name__: job(made(folder / job.__name__), operations, counts.get(job.__name__))
        for job in (kills, errors, strace, full_disk)
    }
    return Tried(
        cases, run_ranks(RANKS, retention, folder)[0], run_ranks(RANKS, save_among_others, folder)[0]
    )


def made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def some(cases: list[T], count: int | None) -> list[T]:
    return cases if count is None else random.Random(0).sample(cases, min(count, len(cases)))


def undisturbed(folder: Path) -> list[str]:
    """Operations of this rank in `SAVES`, with the exchanges between ranks."""
    with joined() as groups, watched(Watch(), agreements=True) as watch:
        save_all(Rank(folder / "undisturbed", groups), folder / "acknowledged")
    return watch.operations


def save_all(rank: Rank, acknowledged: Path, saves: list[Save] = SAVES) -> list[str]:
    """Save until one fails; the message of that. What is acknowledged is noted, one line a version."""
    for save in saves:
        try:
            rank.save(*save)
        except OutputError as error:
            return [str(error)]
        with acknowledged.open("a") as file:
            file.write(f"{save[1]}\n")
    return []


def noted_by(rank: Rank) -> Path:
    return rank.run_dir.with_suffix(f".{rank.groups.rank}")


def newest_noted(acknowledged: Path) -> int:
    return (
        max((int(line) for line in acknowledged.read_text().split()), default=0)
        if acknowledged.exists()
        else 0
    )


def go_on(case: Case, rank: Rank) -> None:
    """The saves that follow every fault."""
    case.found = rank.newest()
    rank.save(*LAST)
    case.after = rank.newest()
    case.names = names_in(rank.run_dir)


def resume(cases: list[Case], run_dirs: list[Path]) -> list[Case]:
    """Go on in two new processes."""

    def job() -> list[Case]:
        with joined() as groups:
            for case, run_dir in zip(cases, run_dirs, strict=True):
                rank = Rank(run_dir, groups)
                go_on(case, rank)
                clear(rank)
        return cases

    for case, run_dir in zip(cases, run_dirs, strict=True):
        case.acknowledged = newest_noted(run_dir.with_suffix(".acknowledged"))
    return run_ranks(RANKS, job)[0]


def kills(folder: Path, operations: list[list[str]], count: int | None) -> list[Case]:
    """SIGKILL before every operation and exchange of either rank."""
    points = [(rank, at) for rank in range(RANKS) for at in range(1, len(operations[rank]) + 1)]
    chosen = some(points, count)
    run_dirs = [folder / f"{rank}-{at}" for rank, at in chosen]
    cases = [
        kill(run_dir, rank, at, operations[rank][at - 1])
        for run_dir, (rank, at) in zip(run_dirs, chosen, strict=True)
    ]
    return resume(cases, run_dirs)


def kill(run_dir: Path, victim: int, at: int, where: str) -> Case:
    def job() -> None:
        with joined() as groups:
            watch = Watch(at if groups.rank == victim else 0, lambda: os.kill(os.getpid(), signal.SIGKILL))
            with watched(watch, agreements=True):
                save_all(Rank(run_dir, groups), run_dir.with_suffix(".acknowledged"))

    codes = exit_codes_of(RANKS, job)
    return Case("SIGKILL", victim, where, fired=codes[victim] == -signal.SIGKILL)


def errors(folder: Path, operations: list[list[str]], count: int | None) -> list[Case]:
    """Errors and short writes at every operation, and a rank that fails without the disk."""
    disks = [[name for name in names if not name.startswith("agree")] for names in operations]
    faults = {
        "ENOSPC": OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        "EIO": OSError(errno.EIO, os.strerror(errno.EIO)),
        "EACCES": PermissionError(errno.EACCES, os.strerror(errno.EACCES)),
        "RuntimeError": RuntimeError("a defect"),
    }
    todo: list[tuple[Case, Break]] = []
    for victim in range(RANKS):
        for at, where in enumerate(disks[victim], 1):
            for name, error in faults.items():
                todo.append((Case(name, victim, where), partial(raising, error, at, once=True)))
            todo.append(
                (Case("EIO from then on", victim, where), partial(raising, faults["EIO"], at, once=False))
            )
        for at in range(1, sum(name.startswith("write") for name in disks[victim]) + 1):
            todo.append((Case("short write", victim, f"write {at}"), partial(short_write, at)))
    broken = [(Case("RuntimeError", rank, "snapshot"), broken_snapshot) for rank in range(RANKS)]
    chosen = [*some(todo, count), *broken]
    attempts = [chosen[start : start + CASES_AN_ATTEMPT] for start in range(0, len(chosen), CASES_AN_ATTEMPT)]
    return [case for number, part in enumerate(attempts) for case in fail_all(part, folder / str(number))]


def fail_all(todo: list[tuple[Case, Break]], folder: Path) -> list[Case]:
    def job() -> list[Case]:
        with joined() as groups:
            for number, (case, breaking) in enumerate(todo):
                fail(case, breaking, Rank(folder / str(number), groups))
        return [case for case, _ in todo]

    folder.mkdir()
    return run_ranks(RANKS, job)[0]


def fail(case: Case, breaking: Break, rank: Rank) -> None:
    with breaking(rank) if rank.groups.rank == case.rank else nullcontext(lambda: False) as fired:
        said = save_all(rank, noted_by(rank))
        compare(case, noted_by(rank), said, fired())
    go_on(case, rank)
    clear(rank)


def compare(case: Case, noted: Path, said: list[str], fired: bool) -> None:
    """Tell all ranks what each has seen."""
    acknowledged = newest_noted(noted)
    gathered: list[tuple] = [()] * RANKS
    dist.all_gather_object(gathered, (said, fired, acknowledged))
    case.said = [message for said, _, _ in gathered for message in said]
    case.fired = any(fired for _, fired, _ in gathered)
    case.acknowledged = max(acknowledged for _, _, acknowledged in gathered)


def clear(rank: Rank) -> None:
    dist.barrier()
    if rank.groups.rank == 0:
        shutil.rmtree(rank.run_dir)
    dist.barrier()


@contextmanager
def raising(error: Exception, at: int, rank: Rank, *, once: bool) -> Iterator[Callable[[], bool]]:
    def act() -> None:
        raise error

    class Persistent(Watch):
        def __call__(self, operation: str, path: Path) -> None:
            super().__call__(operation, path)
            if self.fired:
                raise error

    with watched((Watch if once else Persistent)(at, act)) as watch:
        yield lambda: watch.fired


@contextmanager
def short_write(at: int, rank: Rank) -> Iterator[Callable[[], bool]]:
    """The system takes half of what one call offers."""
    write, calls = os.write, []

    def half(descriptor: int, content: memoryview) -> int:
        calls.append(len(content))
        return write(descriptor, content[: len(content) // 2] if len(calls) == at else content)

    os.write = half  # type: ignore[assignment]
    try:
        yield lambda: len(calls) > at
    finally:
        os.write = write


@contextmanager
def broken_snapshot(rank: Rank) -> Iterator[Callable[[], bool]]:
    """A fault outside the disk: the state cannot be copied."""
    rank.engine.broken_at = SAVES[1][1]
    yield lambda: True  # the message says whether it was so
    rank.engine.broken_at = -1


def nothing() -> None:
    pass


class AtCreate(Watch):
    """Acts before the first file is created."""

    def __call__(self, operation: str, path: Path) -> None:
        if operation == "create" and not self.fired:
            self.fired = True
            self._act()


def retention(folder: Path) -> tuple[int, list[str]]:
    """Save where newer checkpoints are damaged, or belong to abandoned steps."""
    with joined() as groups:
        before, rank = (Rank(folder / "retention", groups, keep=keep) for keep in (4, 2))
        for step in (1, 2, 7, 8):
            before.save(step, step)
        if groups.rank == 0:
            for step in (7, 8):
                path = step_dir(rank.run_dir, step) / rank_file(0)
                path.write_bytes(path.read_bytes()[:-4] + b"lost")
        dist.barrier()
        rank.save(3, 3)
        return rank.newest(), names_in(rank.run_dir)


def save_among_others(folder: Path) -> tuple[list[list[str]], str]:
    """Steps 1 and 5 are another run's, and what step 6 was cannot be read. Step 5's name is wanted too."""
    with joined() as groups:
        before, rank = (Rank(folder / "others", groups, keep=keep) for keep in (9, 1))
        for step in (1, 2, 5, 6):
            before.save(step, step)
        if groups.rank == 0:
            for step in (1, 5):
                edit_manifest(step_dir(rank.run_dir, step), lambda manifest: manifest.update(run_id="other"))
            (step_dir(rank.run_dir, 6) / MANIFEST).write_text("{")
        dist.barrier()
        names, said = [], ""
        for step in (3, 5, 6):
            try:
                rank.save(step, step)
            except OutputError as error:
                said = str(error)
            names.append(names_in(rank.run_dir))
            dist.barrier()
        return names, said


def full_disk(folder: Path, operations: list[list[str]], count: int | None) -> list[Case] | str:
    """A real file system that fills up while a save is on its way, at every page of it. Other processes do
    not see it."""
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNS):
        return f"no mount namespace ({os.strerror(ctypes.get_errno())})"
    private = ["mount", "--make-rprivate", "/"]
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    for command in (private, mount):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            return f"no tmpfs ({done.stderr.strip()})"

    def job() -> list[Case]:
        with joined() as groups:
            return [fill_up(folder, pages, Rank(folder / str(pages), groups)) for pages in range(20)]

    return run_ranks(RANKS, job)[0]


def fill_up(disk: Path, pages: int, rank: Rank) -> Case:
    """Leave so many pages free once the save has seen that there is room."""
    case = Case("ENOSPC", 0, f"{pages} pages left")
    noted, filler = disk.parent / f"noted-{pages}.{rank.groups.rank}", disk / "filler"
    said = save_all(rank, noted, SAVES[:1])

    def occupy() -> None:
        status = os.statvfs(disk)
        filler.write_bytes(bytes((status.f_bavail - pages) * PAGE))

    with watched(AtCreate(act=occupy if rank.groups.rank == 0 else nothing)) as watch:
        said += save_all(rank, noted, SAVES[1:2])
    compare(case, noted, said, watch.fired)
    case.found = rank.newest()
    dist.barrier()
    if rank.groups.rank == 0:
        filler.unlink()
    dist.barrier()
    go_on(case, rank)
    clear(rank)
    return case


def strace(folder: Path, operations: list[list[str]], count: int | None) -> list[Case] | str:
    """Have the kernel fail system calls of the second save, or kill in them."""
    if shutil.which("strace") is None:
        return "strace is not installed"
    cases, run_dirs = [], []
    for number, (victim, call, name, at, fault) in enumerate(some(list(injections()), count)):
        run_dir = folder / str(number)
        case = Case(fault, victim, f"{call} {name}, call {at}")
        inject(case, run_dir, call, checkpoints_dir(run_dir) / name, at)
        cases.append(case)
        run_dirs.append(run_dir)
    return resume(cases, run_dirs)


def injections() -> Iterator[tuple[int, str, str, int, str]]:
    """(rank, system call, its first path under the checkpoints, which call of it, what strace shall do)."""
    temporary, doomed = "step-00000002.tmp", "step-00000001.removed.tmp"
    files = [(0, f"{temporary}/manifest.json", 1), (0, ".latest.tmp", 1)]
    files += [(rank, f"{temporary}/rank-{rank:05d}.safetensors", 19) for rank in range(RANKS)]
    for rank, path, writes in files:
        calls = [("openat", 1), ("fsync", 1), *(("write", at) for at in range(1, writes + 1, 9))]
        for call, at in calls:
            for fault in ("signal=KILL", "error=ENOSPC", "error=EIO", "error=EINTR"):
                yield rank, call, path, at, fault
    for call, path, times in [
        ("mkdir", temporary, 1),
        ("fsync", temporary, 1),
        ("rename", temporary, 1),
        ("fsync", ".", 1),
        ("rename", ".latest.tmp", 1),
        ("rename", "step-00000001", 1),
        ("unlinkat", doomed, RANKS + 1),
    ]:
        for at in range(1, times + 1):
            for fault in ("signal=KILL", "error=EIO", "error=EACCES"):
                yield 0, call, path, at, fault


def inject(case: Case, run_dir: Path, call: str, path: Path, at: int) -> None:
    log = run_dir.with_suffix(".strace")

    def job() -> None:
        with joined() as groups, ExitStack() as stack:
            rank = Rank(run_dir, groups)
            save_all(rank, run_dir.with_suffix(".acknowledged"), SAVES[:1])
            if groups.rank == case.rank:
                stack.enter_context(traced(log, call, path, f"{case.fault}:when={at}"))
            dist.barrier()
            said = save_all(rank, run_dir.with_suffix(".acknowledged"), SAVES[1:2])
            run_dir.with_suffix(f".said{groups.rank}").write_text("\n".join(said))

    codes = exit_codes_of(RANKS, job)
    killed = codes[case.rank] == -signal.SIGKILL
    case.fired = killed if case.fault == "signal=KILL" else "(INJECTED)" in log.read_text()
    texts = [run_dir.with_suffix(f".said{rank}") for rank in range(RANKS)]
    case.said = [text for path in texts if path.exists() and (text := path.read_text())]


@contextmanager
def traced(log: Path, call: str, path: Path, fault: str) -> Iterator[None]:
    """Let strace watch this process: one system call, on one path."""
    command = ["strace", "-f", "-p", str(os.getpid()), "-o", str(log), "-P", str(path.resolve())]
    with subprocess.Popen(
        [*command, "-e", f"trace={call}", "-e", f"inject={call}:{fault}"], stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr
        said = process.stderr.readline()
        if "attached" not in said:
            raise RuntimeError(f"strace: {said}")
        yield
        process.terminate()
