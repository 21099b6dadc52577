"""Worker: two ranks that save while they train, on a disk that waits, fails or hangs.

    python tests/checkpoint/saver_jobs.py FOLDER WORDS_OF_THE_TRAIN_COMMAND...

Each scenario writes what it saw to FOLDER/SCENARIO-RANK.json. The runs of the product, whose ends matter,
leave what they printed in FOLDER/RUN.txt, and their exit codes in FOLDER/RUN.json.
"""

import json
import multiprocessing
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from llama_mcore import cli
from llama_mcore.checkpoint import disk, save
from llama_mcore.checkpoint.layout import checkpoints_dir
from llama_mcore.checkpoint.save import Saver, save_checkpoint
from llama_mcore.config import RunConfig
from llama_mcore.errors import OutputError
from llama_mcore.parallel.groups import Groups, model_parallel_groups
from llama_mcore.train.engine import DeepSpeedEngine
from llama_mcore.train.state import TrainState
from tests.checkpoint.jobs import SEQUENCES, layout, new_engine, take_steps
from tests.forked import exit_codes_of, run_ranks, write_output_to

JOB = layout(tp=1, dp=2, stage=1)
SLOW_S = 0.5
TIMEOUT_S = 4
"""checkpoint.timeout_s of a run whose disk hangs; its sound save takes a fraction of that."""
RUN_TIMEOUT_S = 120
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

    def open_after(self, seconds: float) -> None:
        threading.Timer(seconds, self.opened.set).start()


@contextmanager
def observed_by(observer: Callable[[str, Path], None]) -> Iterator[None]:
    disk.observer = observer
    try:
        yield
    finally:
        disk.observer = lambda operation, path: None


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
        take_steps(self.engine, range(start, start + steps), JOB.dp, self.groups)
        self.state = TrainState(start + steps, (start + steps) * SEQUENCES, run_id="r")

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
    """Publish by polling, as a run does that trains on."""
    rank.train(1)
    waiting, saved, polls = Disk(), None, 0
    with observed_by(waiting):
        rank.saver.begin(rank.state, lr=0.0)
        waiting.open_after(SLOW_S)
        while saved is None:
            time.sleep(0.01)
            saved, polls = rank.saver.poll(), polls + 1
    return {"polls": polls, "stalled_s": saved.stalled_s, "seconds": saved.seconds, "log": waiting.log}


def back_pressure(rank: Rank) -> dict:
    rank.train(1)
    waiting = Disk()
    with observed_by(waiting):
        first = rank.saver.begin(rank.state, lr=0.0)
        rank.train(1)
        waiting.open_after(SLOW_S)
        before = rank.saver.begin(rank.state, lr=0.0)
        last = rank.saver.finish()
    steps = [saved and saved.state.step for saved in (first, before, last)]
    return {"steps": steps, "stalled_s": before.stalled_s if before else 0.0, "log": waiting.log}


def no_room(rank: Rank) -> dict:
    """A disk with a byte less than is asked for, and one with just as much."""
    rank.train(1)
    need = int(1.1 * 12 * rank.run.model.num_params())
    usage = shutil.disk_usage
    said = []
    for step, free in ((1, need), (2, need - 1)):
        save.shutil.disk_usage = lambda path, free=free: usage(path)._replace(free=free)  # type: ignore[attr-defined]
        said.append(refusal(lambda step=step: save_checkpoint_at(rank, step)))
    save.shutil.disk_usage = usage  # type: ignore[attr-defined]
    return {"said": said, "need": need, "left": names(rank)}


def occupied(rank: Rank) -> dict:
    """A writer that was given up for dead wakes up in the folder of its successor."""
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


SCENARIOS = [moment, poll_alone, back_pressure, no_room, occupied, dies]


def work(folder: Path) -> None:
    dist.init_process_group("gloo")
    for scenario in SCENARIOS:
        with model_parallel_groups(JOB.run_config(folder).parallel, 0, torch.device("cpu")) as groups:
            name = scenario.__name__
            seen = scenario(rank_of(folder / name, groups))
            (folder / f"{name}-{groups.rank}.json").write_text(json.dumps(seen))
    dist.barrier()
    dist.destroy_process_group()


@dataclass(frozen=True)
class Run:
    """A run of the product whose second save meets a fault on one rank."""

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

        def observe(operation: str, path: Path) -> None:
            met = operation == "fsync" and path.parent.stem in saves and path.name == file
            if met and rank == self.rank:
                {"raise": fail, "hang": hang, "slow": partial(time.sleep, SLOW_S)}[self.fault]()

        return observe


RUNS = [
    Run("slow", 1),
    Run("raise", 1),
    Run("raise", 0, "publish"),
    Run("hang", 1),
    Run("hang", 0, "publish"),
]


def fail() -> None:
    raise OSError(5, "Input/output error")


def hang() -> None:
    threading.Event().wait()


def train(folder: Path, overrides: list[str], run: Run) -> None:
    def rank_main() -> None:
        write_output_to(folder / f"{run.name}.txt")
        disk.observer = run.observer(int(os.environ["RANK"]))
        limit = [f"checkpoint.timeout_s={TIMEOUT_S}"] if run.fault == "hang" else []
        sys.argv = ["llama-mcore", "train", *overrides, f"run.dir={folder / run.name}", *limit]
        cli.main()

    codes = exit_codes_of(2, rank_main, timeout=RUN_TIMEOUT_S)
    (folder / f"{run.name}.json").write_text(json.dumps(codes))


def main() -> None:
    import llama_mcore.train.loop  # noqa: F401  once, before the ranks are forked

    folder, overrides = Path(sys.argv[1]), sys.argv[2:]
    run_ranks(2, partial(work, folder))
    # together: they wait more than they compute
    fork = multiprocessing.get_context("fork")
    running = [fork.Process(target=train, args=(folder, overrides, run)) for run in RUNS]
    for process in running:
        process.start()
    for process in running:
        process.join()


if __name__ == "__main__":
    main()
