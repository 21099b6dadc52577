"""The whole promise at once: a run that is preempted, killed, stopped, starved of disk and given a NaN in
turn ends where a run ends that was given the same NaN and else left alone, and every second is accounted for.
"""

import json
import os
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from llama_mcore.observe.goodput.attempts import read_ended_attempts
from llama_mcore.observe.goodput.spans import read_attempts, seconds_by_kind, spans_of
from tests.support.models import Small
from tests.support.product import metrics, numbers, tensor_bytes
from tests.train.attempts import Attempt, Lived, ask, be_killed, be_stopped, first_steps, live, spoil_loss

pytestmark = pytest.mark.process

STEPS, NAN_AT = 30, 25
SETTINGS = [
    "parallel.tp=1",
    f"train.steps={STEPS}",
    "checkpoint.interval=5",
    "observe.tensorboard=false",
]
IMPATIENT = ["watchdog.min_step_s=8"]
DISK = 16 << 20
LARGEST_FILE = 256 << 10
"""Less than a checkpoint's files have, more than all others."""


@dataclass(frozen=True)
class Disturbed:
    run_dir: Path
    attempts: list[Lived]
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
    run = [*small.overrides(run_dir), *SETTINGS]
    began = time.time()
    attempts = [
        live_after_a_pause(attempt)
        for attempt in (
            Attempt(run, partial(ask, signal.SIGTERM), step=3, ranks=[0, 1]),
            Attempt(run, be_killed, step=8, ranks=[1]),
            Attempt([*run, *IMPATIENT], be_stopped, step=12, ranks=[1]),
            Attempt(run, partial(starve, ballast), step=13, ranks=[0]),
        )
    ]
    ballast.unlink(missing_ok=True)
    attempts.append(live_after_a_pause(with_nan(run)))
    return Disturbed(run_dir, attempts, began, time.time())


@pytest.fixture(scope="module")
def whole(small: Small, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("whole")
    found = live(with_nan([*small.overrides(run_dir), *SETTINGS]))
    assert found.codes == [0, 0], found.output
    return run_dir


def with_nan(run: list[str]) -> Attempt:
    return Attempt(run, spoil_loss, step=NAN_AT, ranks=[1])


def live_after_a_pause(attempt: Attempt) -> Lived:
    time.sleep(0.1)  # so that the run is down for longer than a tick of the kernel's clock
    return live(attempt)


def starve(ballast: Path) -> None:
    """Fill the disk so that no checkpoint fits; where it is not ours alone, lose the right to write large
    files."""
    if os.path.ismount(ballast.parent):
        ballast.write_bytes(bytes(shutil.disk_usage(ballast.parent).free - LARGEST_FILE))
    else:
        resource.setrlimit(resource.RLIMIT_FSIZE, (LARGEST_FILE, LARGEST_FILE))


def test_each_attempt_ends_as_its_fault_demands(disturbed: Disturbed) -> None:
    """The rank that ended first decides, since a launcher ends the others then."""
    codes = [attempt.first for attempt in disturbed.attempts]
    said = "\n".join(attempt.output for attempt in disturbed.attempts)
    assert codes[0] == 75, said
    assert codes[1] in (1, 128 + signal.SIGKILL), said  # which of the two ranks that is is chance
    assert codes[2:] == [75, 73, 0], said
    assert [attempt.left_over for attempt in disturbed.attempts] == [[]] * 5


def test_the_faults_were_what_they_are_meant_to_be(disturbed: Disturbed) -> None:
    asked = [attempt.asked for attempt in read_ended_attempts(disturbed.run_dir)]
    assert asked == [True, False, False, False, False]
    assert "killed by SIGKILL" in disturbed.attempts[1].output
    (report,) = disturbed.run_dir.glob("stalls/*/rank-00001.json")
    assert json.loads(report.read_text())["state"] == "stopped"
    assert "output error: " in disturbed.attempts[3].output
    assert min(first_steps(disturbed.run_dir)[1:]) > 1  # each went on


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
    attempts = read_attempts(disturbed.run_dir)
    spans = spans_of(attempts)
    seconds = seconds_by_kind(spans)
    first, last = spans[0].began, spans[-1].ended
    assert sum(seconds.values()) == pytest.approx(last - first, rel=1e-9)
    tick = 0.02  # the kernel's clock of process starts has steps of 0.01 s
    assert disturbed.began - tick <= first
    assert last <= disturbed.ended + tick
    assert [kind for kind in seconds if seconds[kind] == 0] == []
    assert first == attempts[0].began
    assert last == attempts[-1].ended


def test_goodput_has_every_attempt_with_its_end(disturbed: Disturbed) -> None:
    """Each attempt's end is that of rank 0."""
    left = [attempt.left for attempt in read_attempts(disturbed.run_dir)]
    assert left == [attempt.codes[0] for attempt in disturbed.attempts]
