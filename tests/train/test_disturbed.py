"""The whole promise at once: a run that is preempted, killed, stopped, starved of disk and given a NaN in
turn ends where a run ends that was given the same NaN and else left alone, and every second is accounted for.
"""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from llama_mcore.observe.goodput import read_lives, seconds_by_kind, spans_of
from llama_mcore.observe.timeline import TIMELINE_FILE
from tests.conftest import Small
from tests.train.product import Finished, finish, left_over, metrics, signal_launcher, start, tensor_bytes
from tests.train.test_dying_ranks import to_the_training_process_of_rank_1
from tests.train.test_run import numbers

STEPS, NAN_AT = 100, 95
SETTINGS = [
    "parallel.tp=1",
    f"train.steps={STEPS}",
    "data.epochs=20",
    "eval.interval=40",
    "checkpoint.interval=5",
    "observe.tensorboard=false",
]
IMPATIENT = ["watchdog.min_step_s=4", "watchdog.first_step_s=15"]
WITH_NAN = ("tests/train/nan_at.py", str(NAN_AT))
DISK = 16 << 20
LARGEST_FILE = 256 << 10
"""Less than a checkpoint's files have, more than all others."""


@dataclass(frozen=True)
class Disturbed:
    run_dir: Path
    lives: list[Finished]
    began: float
    ended: float


@pytest.fixture(scope="module")
def small_disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A file system of its own where that is allowed, else a plain folder."""
    folder = tmp_path_factory.mktemp("disk")
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(folder)]
    mounted = os.geteuid() == 0 and subprocess.run(mount, capture_output=True).returncode == 0
    yield folder
    if mounted:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture(scope="module")
def disturbed(small: Small, small_disk: Path) -> Disturbed:
    run_dir, ballast = small_disk / "run", small_disk / "ballast"
    overrides = small.overrides(run_dir) + SETTINGS
    faults: list[tuple[Callable[[psutil.Process], None], list[str]]] = [
        (signal_launcher(signal.SIGTERM), []),
        (to_the_training_process_of_rank_1(signal.SIGKILL), []),
        (to_the_training_process_of_rank_1(signal.SIGSTOP), IMPATIENT),
        (lambda launcher: starve(launcher, ballast), []),
    ]
    began = time.time()
    lives = [
        disturb(overrides + settings, run_dir, number, fault)
        for number, (fault, settings) in enumerate(faults, start=1)
    ]
    ballast.unlink(missing_ok=True)
    lives.append(finish(start(overrides, ranks=2, script=WITH_NAN)))
    return Disturbed(run_dir, lives, began, time.time())


@pytest.fixture(scope="module")
def whole(small: Small, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("whole")
    found = finish(start(small.overrides(run_dir) + SETTINGS, ranks=2, script=WITH_NAN))
    assert found.exit_code == 0, "\n".join(found.lines)
    return run_dir


def disturb(
    overrides: list[str], run_dir: Path, life: int, fault: Callable[[psutil.Process], None]
) -> Finished:
    """Train until a few steps of this life are done, and let the fault happen."""
    process = start(overrides, ranks=2)
    while steps_begun(run_dir, life) < 6:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    fault(psutil.Process(process.pid))
    return finish(process)


def steps_begun(run_dir: Path, life: int) -> int:
    path = run_dir / TIMELINE_FILE
    lines = path.read_text().splitlines() if path.exists() else []
    begun = [number for number, line in enumerate(lines) if '"life"' in line]
    return sum('"train"' in line for line in lines[begun[-1] :]) if len(begun) == life else 0


def starve(launcher: psutil.Process, ballast: Path) -> None:
    """Fill the disk; where it is not ours alone, take the right to write large files."""
    if os.path.ismount(ballast.parent):
        with ballast.open("wb", buffering=0) as file:
            while file.write(bytes(1 << 16)) == 1 << 16:
                pass
        return
    for process in launcher.children(recursive=True):
        process.rlimit(psutil.RLIMIT_FSIZE, (LARGEST_FILE, LARGEST_FILE))


def test_each_life_ends_as_its_fault_demands(disturbed: Disturbed) -> None:
    codes = [life.exit_code for life in disturbed.lives]
    said = "\n".join(line for life in disturbed.lives for line in life.lines)
    assert codes[0] == 75, said
    assert codes[1] in (1, 137), said  # which of the two ranks ends first is chance
    assert codes[2:] == [75, 73, 0], said
    assert left_over(disturbed.run_dir) == []


def test_the_faults_were_what_they_are_meant_to_be(disturbed: Disturbed) -> None:
    preempted, killed, stopped, starved, last = ("\n".join(life.lines) for life in disturbed.lives)
    assert "the same command goes on" in preempted
    assert "killed by SIGKILL" in killed
    assert "behind: rank 1 on " in stopped
    assert "output error: " in starved
    assert "resuming at step " in last


def test_it_ends_as_the_run_that_was_left_alone_bit_for_bit(disturbed: Disturbed, whole: Path) -> None:
    rows = metrics(whole)
    assert [row["step"] for row in rows if row.get("skipped")] == [NAN_AT]
    assert rows[-1]["step"] == STEPS
    assert rows[-1]["loss"] is not None
    assert numbers(disturbed.run_dir) == numbers(whole)
    last = f"checkpoints/step-{STEPS:08d}"
    files = sorted(path.name for path in (whole / last).glob("*.safetensors"))
    assert len(files) == 2
    for name in files:
        assert tensor_bytes(disturbed.run_dir / last / name) == tensor_bytes(whole / last / name)


def test_goodput_accounts_for_every_second(disturbed: Disturbed) -> None:
    lives = read_lives(disturbed.run_dir)
    spans = spans_of(lives)
    seconds = seconds_by_kind(spans)
    first, last = spans[0].began, spans[-1].ended
    assert sum(seconds.values()) == pytest.approx(last - first, rel=1e-9)
    tick = 0.02  # the kernel's clock of process starts has steps of 0.01 s
    assert disturbed.began - tick <= first
    assert last <= disturbed.ended + tick
    kinds = ("productive", "lost", "saving", "evaluation", "restarting", "ending", "down")
    assert [kind for kind in kinds if seconds[kind] == 0] == []
    assert first == lives[0].began
    assert last == lives[-1].ended


def test_goodput_has_every_life_with_its_end(disturbed: Disturbed) -> None:
    """As rank 0 ended: by itself, or by torchrun, when the other one was killed."""
    codes = [life.left for life in read_lives(disturbed.run_dir)]
    assert codes == [75, codes[1], 75, 73, 0]
    assert codes[1] in (1, 128 + signal.SIGTERM)
