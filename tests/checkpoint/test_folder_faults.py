"""A run's folder in which people, other programs and crashes have left things.

The same command goes on from the run's newest valid checkpoint, or is refused with a documented exit code, in
bounded time; and what the run did not write stays as it is.

`make test` tries a sample, `make test-crash` every fault.
"""

import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.models import Small
from tests.support.product import Finished, llama_mcore, metrics, train

pytestmark = pytest.mark.process

DONE, STEPS = 4, 6
SETTINGS = ["parallel.tp=1", "checkpoint.interval=2", "checkpoint.keep=1"]
Damage = Callable[[Path], object]


def copied_as(name: str, step: int = DONE) -> Damage:
    """A user's copy of a checkpoint."""
    return lambda run_dir: shutil.copytree(
        run_dir / f"checkpoints/step-{step:08d}", run_dir / "checkpoints" / name
    )


def fifo(name: str) -> Damage:
    return lambda run_dir: (_gone(run_dir / name), os.mkfifo(run_dir / name))


def link(name: str, to: str) -> Damage:
    return lambda run_dir: (_gone(run_dir / name), (run_dir / name).symlink_to(to))


def content(name: str, text: str) -> Damage:
    return lambda run_dir: (run_dir / name).write_text(text)


def removed(name: str) -> Damage:
    return lambda run_dir: _gone(run_dir / name)


def _gone(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


NEWEST = f"checkpoints/step-{DONE:08d}"
FAULTS: dict[str, tuple[Damage, int]] = {
    "a copy with a name": (copied_as("step-best"), 0),
    "a copy with an unpadded number": (copied_as("step-55"), 0),
    "a copy with an ending": (copied_as(f"step-{DONE:08d}.bak"), 0),
    "a copy with a suffix": (copied_as(f"step-{DONE:08d}-good"), 0),
    "a copy as a later step": (copied_as("step-00000055"), 0),
    "a file named as a step": (content("checkpoints/step-00000055", "mine"), 0),
    "a pipe named as a step": (fifo("checkpoints/step-00000055"), 0),
    "a link named as a step": (link("checkpoints/step-00000055", "../../elsewhere"), 0),
    "an empty manifest": (content(f"{NEWEST}/manifest.json", ""), 65),
    "a manifest that is a pipe": (fifo(f"{NEWEST}/manifest.json"), 65),
    "another run's id": (content("run.json", '{"run_id": "beef", "began": "2026-01-01T00:00:00+00:00"}'), 64),
    "no run.json": (removed("run.json"), 0),
    "an empty run.json": (content("run.json", ""), 65),
    "a run.json that is a pipe": (fifo("run.json"), 65),
    "a run.json that never ends": (link("run.json", "/dev/zero"), 65),
    "no lease": (removed("lease"), 0),
    "a lease that is a pipe": (fifo("lease/00000009.json"), 0),
    "metrics that are a pipe": (fifo("metrics.jsonl"), 73),
    "no metrics": (removed("metrics.jsonl"), 0),
    "a hint that is a pipe": (fifo("checkpoints/latest"), 0),
    "a configuration that never ends": (link("config.yaml", "/dev/zero"), 0),
}
SAMPLE = ["a copy with a name", "a manifest that is a pipe", "another run's id"]
OWN = (
    "run.json",
    "config.yaml",
    "metrics",
    "timeline",
    "attempts",
    "lease",
    "tensorboard",
    "checkpoints/latest",
)
"""Beginnings of names that a start may write; and it removes its own older checkpoint."""


@pytest.fixture(scope="module")
def finished(uninterrupted: Callable[..., Path]) -> Path:
    return uninterrupted([*SETTINGS, f"train.steps={DONE}"], ranks=1)


def looks(run_dir: Path) -> dict[str, object]:
    """Name -> content of each file, or kind of anything else."""
    found: dict[str, object] = {}
    for path in run_dir.rglob("*"):
        mode = path.lstat().st_mode
        regular = stat.S_ISREG(mode) and not stat.S_ISLNK(mode)
        found[str(path.relative_to(run_dir))] = path.read_bytes() if regular else stat.S_IFMT(mode)
    return found


def try_fault(name: str, small: Small, finished: Path, run_dir: Path) -> Finished:
    damage, exit_code = FAULTS[name]
    shutil.copytree(finished, run_dir)
    damage(run_dir)
    before = looks(run_dir)
    ended = train([*small.overrides(run_dir), *SETTINGS, f"train.steps={STEPS}"])
    assert ended.exit_code == exit_code, ended.output
    assert "Traceback" not in ended.output
    after = looks(run_dir)
    changed = [path for path in before if before[path] != after.get(path) and not path.startswith(OWN)]
    if exit_code:
        assert changed == []
        return ended
    assert all(path.startswith(NEWEST + "/") or path == NEWEST for path in changed), changed
    assert [row["step"] for row in metrics(run_dir)][-2:] == [DONE + 1, STEPS]
    checked = llama_mcore("inspect-checkpoint", "--verify", run_dir / f"checkpoints/step-{STEPS:08d}")
    assert checked.exit_code == 0, checked.output
    return ended


@pytest.mark.parametrize("name", SAMPLE)
def test_a_folder_that_others_wrote_to(small: Small, finished: Path, tmp_path: Path, name: str) -> None:
    try_fault(name, small, finished, tmp_path / "run")


@pytest.mark.crash
@pytest.mark.parametrize("name", FAULTS)
def test_every_folder_that_others_wrote_to(small: Small, finished: Path, tmp_path: Path, name: str) -> None:
    ended = try_fault(name, small, finished, tmp_path / "run")
    print(f"{name:35} exit code {ended.exit_code}")
