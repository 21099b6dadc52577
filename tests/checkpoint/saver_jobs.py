"""Two ranks that save while they train, on a disk that waits, fails or hangs, and with copies that do."""

import logging
import os
import shutil
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from llama_mcore.checkpoint import durable_io
from llama_mcore.checkpoint import saver as saver_module
from llama_mcore.checkpoint.loader import load_checkpoint
from llama_mcore.checkpoint.paths import checkpoints_dir
from llama_mcore.checkpoint.reader import CheckpointReader
from llama_mcore.checkpoint.run_dir import find_checkpoint
from llama_mcore.checkpoint.run_lock import FOLDER, held_lease
from llama_mcore.checkpoint.saver import Saver, save_checkpoint
from llama_mcore.checkpoint.train_state import TrainState
from llama_mcore.config.schema import RunConfig
from llama_mcore.distributed.device import CopyStream
from llama_mcore.distributed.groups import Groups, model_parallel_groups
from llama_mcore.errors import OutputError
from llama_mcore.observe.log import get_logger
from llama_mcore.train.engine import DeepSpeedEngine
from tests.checkpoint.jobs import SEQUENCES, layout, new_engine, take_steps
from tests.support.models import UNEVEN, run_config
from tests.support.product import run_command

T = TypeVar("T")

JOB = layout(tp=1, dp=2, stage=1)
SLOW_S = 0.5
POLLS = 10
RING_BYTES = 64 << 10
"""Less than what a rank of `JOB` saves, and the least that a run may ask for."""
TIMEOUT_S = 20
"""checkpoint.timeout_s of a run whose disk hangs; its sound save takes a small fraction of that."""
FIRST, SECOND, LAST = "step-00000003", "step-00000006", "step-00000008"
STEPS = 8


@dataclass
class Disk:
    """Tells what was done to the real disk, and lets the writing threads wait until it is opened."""

    log: list[str] = field(default_factory=list)
    opened: threading.Event = field(default_factory=threading.Event)

    def __call__(self, operation: str, path: Path) -> None:
        if threading.current_thread() is not threading.main_thread():
            self.opened.wait()
        self.log.append(f"{operation} {path.parent.name}/{path.name}")

    def open_when(self, condition: Callable[[], bool]) -> None:
        """`SLOW_S` after that."""

        def wait() -> None:
            while not condition():
                time.sleep(0.01)
            time.sleep(SLOW_S)
            self.opened.set()

        threading.Thread(target=wait).start()


def waits_in(function: Callable[..., object]) -> bool:
    """True if the main thread is in `function` and waits there for another thread."""
    stack = sys._current_frames()[threading.main_thread().ident or 0]
    codes = [frame.f_code for frame, _ in traceback.walk_stack(stack)]
    return codes[0].co_filename == threading.__file__ and function.__code__ in codes


@contextmanager
def copying(copy: Callable[[CopyStream, Any], None]) -> Iterator[None]:
    """Let copies between device and host memory be made by `copy`."""
    real, CopyStream.copy = CopyStream.copy, copy  # type: ignore[method-assign]
    try:
        yield
    finally:
        CopyStream.copy = real  # type: ignore[method-assign]


@contextmanager
def slow_copies(waiting: Disk) -> Iterator[None]:
    """Copies wait until `waiting` is opened."""
    real = CopyStream.copy

    def copy(stream: CopyStream, pairs: Any) -> None:
        waiting.opened.wait()
        real(stream, pairs)

    with copying(copy):
        yield


@contextmanager
def heard() -> Iterator[list[str]]:
    """Log lines, on every rank."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = get_logger()
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield lines
    logger.removeHandler(handler)


@contextmanager
def observed_by(observer: Callable[[str, Path], None]) -> Iterator[None]:
    durable_io.observer = observer
    try:
        yield
    finally:
        durable_io.observer = lambda operation, path: None


@dataclass
class Rank:
    folder: Path
    run: RunConfig
    groups: Groups
    engine: DeepSpeedEngine
    saver: Saver
    state: TrainState

    def train(self, steps: int) -> None:
        start = self.state.step
        take_steps(self.engine, range(start, start + steps), JOB.dp, self.groups, self.saver.before_update)
        self.state = TrainState(start + steps, (start + steps) * SEQUENCES, run_id="r")

    def saver_with(self, **checkpoint: object) -> Saver:
        """A saver with other settings."""
        return Saver(self.engine, self.run.changed(checkpoint=checkpoint), self.groups)

    def save_beside(self, name: str) -> None:
        """The state of now, saved while nothing else happens."""
        beside = self.run.model_copy(update={"run": self.run.run.model_copy(update={"dir": name})})
        save_checkpoint(self.engine, beside, self.state, self.groups)


def rank_of(folder: Path, groups: Groups) -> Rank:
    run = JOB.run_config(folder.parent, folder.name)
    engine = new_engine(run, groups)
    return Rank(folder, run, groups, engine, Saver(engine, run, groups), TrainState())


def moment(rank: Rank) -> dict:
    """Save twice, and train on while the disk waits."""
    seen = []
    for _ in range(2):
        rank.train(1)
        rank.save_beside(f"{rank.folder}-then-{rank.state.step}")
        waiting = Disk()
        with observed_by(waiting):
            rank.saver.begin(rank.state, lr=0.0)
            done_when_it_returned = len([line for line in waiting.log if not line.startswith(("mk", "rem"))])
            rank.train(2)
            early = rank.saver.poll()
            waiting.opened.set()
            saved = rank.saver.finish()
        seen.append([done_when_it_returned, early is None, saved is not None and saved.state.step])
    rank.save_beside(f"{rank.folder}-later")
    return {"seen": seen}


def poll_alone(rank: Rank) -> dict:
    """Publish by polling, as a run does that trains on. The disk waits until `POLLS` polls are over."""
    rank.train(1)
    waiting, saved, polls, in_calls_s = Disk(), None, 0, 0.0

    def timed(call: Callable[[], T]) -> T:
        nonlocal in_calls_s
        started = time.perf_counter()
        result = call()
        in_calls_s += time.perf_counter() - started
        return result

    with observed_by(waiting):
        timed(lambda: rank.saver.begin(rank.state, lr=0.0))
        while saved is None:
            time.sleep(0.01)
            saved, polls = timed(rank.saver.poll), polls + 1
            if polls == POLLS:
                waiting.opened.set()
    return {
        "polls": polls,
        "in_calls_s": in_calls_s,
        "stalled_s": saved.stalled_s,
        "seconds": saved.seconds,
        "log": waiting.log,
    }


def back_pressure(rank: Rank) -> dict:
    rank.train(1)
    waiting = Disk()
    with observed_by(waiting), heard() as said:
        first = rank.saver.begin(rank.state, lr=0.0)
        rank.train(1)
        waiting.open_when(lambda: waits_in(Saver.begin))
        before = rank.saver.begin(rank.state, lr=0.0)
        last = rank.saver.finish()
    steps = [saved and saved.state.step for saved in (first, before, last)]
    stalled_s = before.stalled_s if before else 0.0
    return {"steps": steps, "stalled_s": stalled_s, "log": waiting.log, "said": said}


def slow_copy(rank: Rank) -> dict:
    """Save, and train on before anything is copied: without a wait it is copied when two steps are done."""
    rank.train(1)
    rank.save_beside(f"{rank.folder}-then")
    waiting, finished = Disk(), []
    with slow_copies(waiting):
        waiting.open_when(lambda: finished or waits_in(Saver.before_update))
        rank.saver.begin(rank.state, lr=0.0)
        rank.train(2)
        finished.append(True)
        saved = rank.saver.finish()
    return {"stalled_s": saved.stalled_s if saved else 0.0}


def failing_copy(rank: Rank) -> dict:
    """A rank that cannot copy: training goes on, and learns of it as of a failing disk."""
    rank.train(1)
    save_checkpoint_at(rank, 1)

    def fail(stream: CopyStream, pairs: Any) -> None:
        raise RuntimeError("the device is gone")

    with copying(fail) if rank.groups.rank == 1 else nullcontext():
        rank.saver.begin(rank.state, lr=0.0)
        rank.train(1)
        said = refusal(rank.saver.finish)
    return {"said": said, "left": names(rank)}


def closing_early(rank: Rank) -> dict:
    """A run that ends by an error closes its saver while the state is copied."""
    rank.train(1)
    waiting, closed = Disk(), []
    with slow_copies(waiting):
        waiting.open_when(lambda: closed or waits_in(Saver.close))
        rank.saver.begin(rank.state, lr=0.0)
        rank.saver.close()
        closed.append(True)
        opened = waiting.opened.is_set()
    return {"opened": opened}


def ring(rank: Rank) -> dict:
    """The same state by way of a ring that holds a part of it, on a disk that waits."""
    rank.train(1)
    rank.save_beside(f"{rank.folder}-whole")
    small = rank.saver_with(host_memory=RING_BYTES)
    waiting, begun = Disk(), []
    with observed_by(waiting):
        waiting.open_when(lambda: begun or waits_in(Saver.begin))
        small.begin(rank.state, lr=0.0)
        begun.append(True)
        in_begin = waiting.opened.is_set()
        saved = small.finish()
    folders = [saved.path if saved else None, find_checkpoint(Path(f"{rank.folder}-whole"))]
    return {
        "in_begin": in_begin,
        "stalled_s": saved.stalled_s if saved else 0.0,
        "memory": [rank.saver.memory, small.memory],
        "files": [CheckpointReader(folder).manifest.files for folder in folders if folder],
    }


def hanging_ring(rank: Rank) -> dict:
    """The disk of one rank hangs while training waits for it."""
    small = rank.saver_with(host_memory=RING_BYTES, timeout_s=SLOW_S)
    waiting = Disk()
    with observed_by(waiting) if rank.groups.rank == 1 else nullcontext():
        said = refusal(lambda: small.begin(TrainState(1, 4, run_id="r"), lr=0.0))
        waiting.opened.set()
    return {"said": said}


def offloaded(rank: Rank) -> dict:
    """Masters and moments in host memory: saved beside the steps that follow, loaded, and trained on."""
    zero = {"stage": 3, "config": "ds_configs/zero3_offload.json"}
    run = run_config(rank.folder, UNEVEN, zero=zero, train={"micro_batch_size": SEQUENCES // JOB.dp})
    engine = new_engine(run, rank.groups)
    take_steps(engine, range(2), JOB.dp, rank.groups)
    saver = Saver(engine, run, rank.groups)
    saver.begin(TrainState(2, 2 * SEQUENCES), lr=0.0)
    before = take_steps(engine, range(2, 4), JOB.dp, rank.groups, saver.before_update)
    saved = saver.finish()
    again = new_engine(run, rank.groups)
    assert saved
    load_checkpoint(again, CheckpointReader(saved.path), rank.groups)
    return {"before": before, "after": take_steps(again, range(2, 4), JOB.dp, rank.groups)}


def no_room(rank: Rank) -> dict:
    """A disk with a byte less than is asked for, and one with just as much."""
    rank.train(1)
    need = int(1.1 * 12 * rank.run.model.num_params())
    usage = shutil.disk_usage
    said = []
    for step, free in ((1, need), (2, need - 1)):
        saver_module.shutil.disk_usage = lambda path, free=free: usage(path)._replace(free=free)  # type: ignore[attr-defined]
        said.append(refusal(lambda step=step: save_checkpoint_at(rank, step)))
    saver_module.shutil.disk_usage = usage  # type: ignore[attr-defined]
    return {"said": said, "need": need, "left": names(rank)}


def occupied(rank: Rank) -> dict:
    """A writer that was presumed dead wakes up in the folder of its successor."""
    rank.train(1)
    save_checkpoint_at(rank, 1)

    def wake_up(operation: str, path: Path) -> None:
        if operation == "create" and path.name == "rank-00001.safetensors":
            path.write_bytes(b"of another writer")

    with observed_by(wake_up):
        said = refusal(lambda: save_checkpoint_at(rank, 2))
    return {"said": said, "left": names(rank)}


def dies(rank: Rank) -> dict:
    """A writer raises what no disk does, on one rank."""
    rank.train(1)
    save_checkpoint_at(rank, 1)

    def die(operation: str, path: Path) -> None:
        if path.name == "rank-00001.safetensors":
            raise MemoryError("no more")

    with observed_by(die):
        said = refusal(lambda: save_checkpoint_at(rank, 2))
    return {"said": said, "left": names(rank)}


def taken_over(rank: Rank) -> dict:
    """While the second save is written another job, which thinks this one dead, takes the run."""
    rank.train(1)
    with held_lease(rank.folder) if rank.groups.rank == 0 else nullcontext() as lease:
        saver = Saver(rank.engine, rank.run, rank.groups, lease)
        begin_with(saver, 1)
        said = [refusal(saver.finish)]
        begin_with(saver, 2)
        if lease:
            (rank.folder / FOLDER / f"{lease.number + 1:08d}.json").touch()
        said += [refusal(saver.finish), refusal(lambda: begin_with(saver, 3))]
    return {"said": said, "left": names(rank)}


def begin_with(saver: Saver, step: int) -> None:
    saver.begin(TrainState(step, step, run_id="r"), lr=0.0)


def save_checkpoint_at(rank: Rank, step: int) -> None:
    save_checkpoint(rank.engine, rank.run, TrainState(step, step, run_id="r"), rank.groups)


def refusal(action: Callable[[], object]) -> str:
    try:
        action()
    except OutputError as error:
        return str(error)
    return ""


def names(rank: Rank) -> list[str]:
    """Folders of checkpoints, whole and begun."""
    return sorted(path.name for path in checkpoints_dir(rank.folder).iterdir() if path.is_dir())


SCENARIOS = [
    *(
        moment,
        poll_alone,
        back_pressure,
        slow_copy,
        failing_copy,
        closing_early,
        ring,
        hanging_ring,
        offloaded,
    ),
    *(no_room, occupied, dies, taken_over),
]


def play(folder: Path) -> dict[str, dict]:
    """Observations of this rank in each scenario."""
    dist.init_process_group("gloo")
    seen = {}
    for scenario in SCENARIOS:
        with model_parallel_groups(JOB.run_config(folder).parallel, 0, torch.device("cpu")) as groups:
            name = scenario.__name__
            seen[name] = scenario(rank_of(folder / name, groups))
    dist.barrier()
    dist.destroy_process_group()
    return seen


@dataclass(frozen=True)
class Run:
    """A run of the product whose second save meets a fault on one rank; or whose copies are all late."""

    fault: str
    rank: int
    phase: str = "write"

    @property
    def name(self) -> str:
        return f"{self.fault}-{self.phase}-{self.rank}"

    def observer(self, rank: int) -> Callable[[str, Path], None]:
        """A slow disk is slow in the last save too, for which the run has to wait."""
        file = "manifest.json" if self.phase == "publish" else f"rank-{self.rank:05d}.safetensors"
        saves = (SECOND, LAST) if self.fault == "slow" else (SECOND,)
        acts = {"raise": fail, "hang": hang, "slow": partial(time.sleep, SLOW_S)}

        def observe(operation: str, path: Path) -> None:
            met = operation == "fsync" and path.parent.stem in saves and path.name == file
            if met and rank == self.rank and self.fault in acts:
                acts[self.fault]()

        return observe


RUNS = [
    Run("slow", 1),
    Run("late", 1),
    Run("raise", 1),
    Run("raise", 0, "publish"),
    Run("hang", 1),
    Run("hang", 0, "publish"),
]


def fail() -> None:
    raise OSError(5, "Input/output error")


def hang() -> None:
    threading.Event().wait()


def copy_late(stream: CopyStream, pairs: Any) -> None:
    """A late copy, for which training waits at the next update or the last save."""
    while not any(map(waits_in, (Saver.before_update, Saver.finish))):
        time.sleep(0.01)
    for target, source in pairs:
        target.copy_(source)


def train(run: Run, words: list[str]) -> None:
    durable_io.observer = run.observer(int(os.environ["RANK"]))
    with copying(copy_late) if run.fault == "late" else nullcontext():
        run_command(words)
