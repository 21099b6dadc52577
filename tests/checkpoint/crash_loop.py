"""Worker: train a run to its end although it is killed again and again, and once without that.

    python tests/checkpoint/crash_loop.py FOLDER KILLS forked|torchrun OVERRIDES.json

A supervisor starts the same command on two ranks until it has finished: FOLDER/killed. The same run without
faults is FOLDER/whole. FOLDER/faults.json gets what was done to it. `forked` spares the start of the
interpreter; `torchrun` is the command of a user.
"""

import json
import multiprocessing
import random
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from signal import SIGKILL, SIGSTOP, SIGTERM, SIGUSR1

import psutil

from llama_mcore import cli
from tests.forked import exit_codes_of, write_output_to
from tests.train.product import LLAMA_MCORE, finish, metrics, start

RANKS = 2
LONGEST_LIFE_S = 300
MOST_STEPS = 4
"""New steps that a life is given at most before it is killed."""
STOPPED_S = 0.3


@dataclass(frozen=True)
class Fault:
    signals: list[int]
    target: str
    """launcher, or the number of a rank."""
    steps: int
    """That the run had done."""

    @property
    def name(self) -> str:
        return " then ".join(signal.Signals(number).name for number in self.signals)


def main() -> None:
    folder, kills, how, overrides = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4])
    write_output_to(folder / "output.txt")
    import llama_mcore.train.loop  # noqa: F401  once, before anything is forked

    random.seed(0)
    words = json.loads(overrides.read_text())
    whole = forked([f"run.dir={folder / 'whole'}", *words])
    if whole.wait(LONGEST_LIFE_S):
        sys.exit("the run without faults failed")
    begin = forked if how == "forked" else by_torchrun
    run_dir = folder / "killed"
    command = [f"run.dir={run_dir}", *words]
    faults = [live_and_die(partial(begin, command), run_dir, how) for _ in range(kills)]
    if begin(command).wait(LONGEST_LIFE_S):
        sys.exit("the run did not finish")
    (folder / "faults.json").write_text(json.dumps([asdict(fault) for fault in faults]))


@dataclass(frozen=True)
class Life:
    launcher: psutil.Process
    wait: Callable[[float], int | None]
    """Exit code of the launcher, after at most so many seconds."""


def forked(overrides: list[str]) -> Life:
    def run() -> None:
        sys.argv = ["llama-mcore", "train", "--config", "tiny", *overrides]
        cli.main()

    def launch() -> None:
        sys.exit(max(code if code is not None and code >= 0 else 1 for code in exit_codes_of(RANKS, run)))

    process = multiprocessing.get_context("fork").Process(target=launch)
    process.start()

    def wait(seconds: float) -> int | None:
        process.join(seconds)
        return process.exitcode

    return Life(psutil.Process(process.pid), wait)


def by_torchrun(overrides: list[str]) -> Life:
    process = start(overrides, ranks=RANKS, launcher=(*LLAMA_MCORE, "--standalone"))

    def wait(seconds: float) -> int | None:
        done = finish(process)
        print(*done.lines, sep="\n", flush=True)
        return done.exit_code

    return Life(psutil.Process(process.pid), wait)


def live_and_die(begin: Callable[[], Life], run_dir: Path, how: str) -> Fault:
    """Start the run and break it: a few steps later, or one in five times while it starts."""
    seen = len(metrics(run_dir))
    life = begin()
    if random.random() < 0.2:
        time.sleep(random.uniform(0, 1.5))
    else:
        wait_for_steps(life, run_dir, seen + random.randint(1, MOST_STEPS))
        time.sleep(random.uniform(0, 0.05))
    fault = break_it(life, len(metrics(run_dir)), how)
    life.wait(LONGEST_LIFE_S)
    return fault


def wait_for_steps(life: Life, run_dir: Path, steps: int) -> None:
    until = time.monotonic() + LONGEST_LIFE_S
    while len(metrics(run_dir)) < steps:
        if not is_alive(life.launcher) or time.monotonic() > until:
            life.wait(1)
            sys.exit(f"the run ended, or hung, before step {steps}")
        time.sleep(0.005)


def is_alive(process: psutil.Process) -> bool:
    with suppress(psutil.Error):
        return process.status() != psutil.STATUS_ZOMBIE
    return False


def break_it(life: Life, steps: int, how: str) -> Fault:
    """Signal one rank or the launcher; of a launcher that is gone nothing may stay at work."""
    ranks = ranks_of(life)
    target = random.choice(["launcher", *map(str, range(RANKS))])
    chosen = random.choice([[SIGKILL], [SIGTERM], [SIGUSR1], [SIGSTOP, SIGKILL]])
    if target == "launcher" and how == "forked":
        chosen = [SIGKILL]  # multiprocessing passes nothing on
    victim = life.launcher if target == "launcher" else ranks[int(target)]
    for number in chosen:
        victim.send_signal(number)
        if number == SIGSTOP:
            time.sleep(STOPPED_S)
    if target == "launcher" and SIGKILL in chosen:  # as a scheduler does
        time.sleep(random.uniform(0, 0.2))
        for rank in ranks:
            with suppress(psutil.Error):
                rank.kill()
        psutil.wait_procs(ranks, timeout=30)
    return Fault([int(number) for number in chosen], target, steps)


def ranks_of(life: Life) -> list[psutil.Process]:
    until = time.monotonic() + LONGEST_LIFE_S
    while len(ranks := life.launcher.children()) < RANKS and time.monotonic() < until:
        time.sleep(0.01)
    return ranks


if __name__ == "__main__":
    main()
