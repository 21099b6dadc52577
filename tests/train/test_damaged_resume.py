"""A run whose newest checkpoint is damaged goes on from the newest valid one, and says so; else it ends."""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from tests.support.errors import is_shown
from tests.support.models import Small
from tests.support.product import Finished, checkpoints, metrics, tensor_bytes, train

pytestmark = pytest.mark.process

SETTINGS = [
    "parallel.tp=1",
    "checkpoint.interval=1",
    "checkpoint.keep=9",
    "optim.warmup_steps=1",
    "observe.tensorboard=false",
]
STEPS = 5
NEWEST = "step-00000003"
LAST_OF_ONE, LAST_OF_TWO = "rank-00000.safetensors", "rank-00001.safetensors"


def flip_a_bit(path: Path) -> None:
    """Flip a bit of the last element; sizes, header and manifest stay as they are."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    os.truncate(path, 1000)


def empty(path: Path) -> None:
    os.truncate(path, 0)


@dataclass(frozen=True)
class Damage:
    name: str
    ranks: int
    spoil: Callable[[Path], None]
    file: str


DAMAGES = [
    Damage("bit", 1, flip_a_bit, LAST_OF_ONE),
    Damage("manifest", 1, empty, "manifest.json"),
    # what rank 1 alone reads
    Damage("bit-of-two", 2, flip_a_bit, LAST_OF_TWO),
]


def spoil_two(newest: Path) -> None:
    empty(newest / "manifest.json")
    cut(newest.with_name("step-00000002") / LAST_OF_ONE)


def spoil_all(newest: Path) -> None:
    """Each in another way."""
    flip_a_bit(newest / LAST_OF_ONE)
    cut(newest.with_name("step-00000002") / LAST_OF_ONE)
    empty(newest.with_name("step-00000001") / "manifest.json")


CASES: dict[str, tuple[int, Callable[[Path], object]]] = {
    "without-1": (1, shutil.rmtree),
    "without-2": (2, shutil.rmtree),
    "two-damaged": (1, spoil_two),
    "none": (2, spoil_all),
    **{
        damage.name: (damage.ranks, lambda newest, damage=damage: damage.spoil(newest / damage.file))
        for damage in DAMAGES
    },
}
"""On how many ranks, and what is done to the newest of three checkpoints before the run goes on."""


@dataclass(frozen=True)
class WentOn:
    run_dir: Path
    before: dict[str, bytes]
    """What was there, without the lease, which tells who was there."""
    ended: Finished


@pytest.fixture(scope="module")
def went_on(
    small: Small, uninterrupted: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], WentOn]:
    """went_on(name): how the case of this name did, which is tried once."""
    folder = tmp_path_factory.mktemp("damaged")

    @cache
    def ended(name: str) -> WentOn:
        ranks, spoil = CASES[name]
        run_dir = folder / name
        shutil.copytree(uninterrupted([*SETTINGS, "train.steps=3"], ranks=ranks), run_dir)
        spoil(run_dir / "checkpoints" / NEWEST)
        before = tree(run_dir)
        settings = [*small.overrides(run_dir), *SETTINGS, f"train.steps={STEPS}"]
        return WentOn(run_dir, before, train(settings, ranks=ranks))

    return ended


def tree(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    named = {str(path.relative_to(folder)): path for path in paths}
    return {name: path.read_bytes() for name, path in named.items() if not name.startswith("lease")}


def losses(run_dir: Path) -> dict[int, tuple[float, float]]:
    return {row["step"]: (row["loss"], row["grad_norm"]) for row in metrics(run_dir)}


def kept(found: WentOn) -> int:
    """Number of the earlier run's steps that are still in its metrics."""
    before = found.before["metrics.jsonl"].splitlines()
    now = (found.run_dir / "metrics.jsonl").read_bytes().splitlines()
    return sum(line in before for line in now)


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.name)
def test_it_goes_on_from_the_newest_sound_one_and_says_so(
    went_on: Callable[[str], WentOn], damage: Damage
) -> None:
    found = went_on(damage.name)
    output, damaged = found.ended.output, f"{NEWEST}/{damage.file}"
    assert found.ended.exit_codes == [0] * damage.ranks, output
    said = [line for line in output.splitlines() if f"{NEWEST} IS DAMAGED and skipped" in line]
    assert said
    assert all(damaged in line for line in said)
    assert kept(found) == 2
    rows = metrics(found.run_dir)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    (reported,) = rows[2]["damaged_checkpoints"]
    assert damaged in reported
    assert not any("damaged_checkpoints" in row for row in rows if row["step"] != 3)


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.name)
def test_the_result_is_that_of_a_run_resumed_from_there(
    went_on: Callable[[str], WentOn], damage: Damage
) -> None:
    without, run_dir = went_on(f"without-{damage.ranks}").run_dir, went_on(damage.name).run_dir
    assert losses(run_dir) == losses(without)
    # What cannot be read is nobody's for certain, and not replaced.
    aside = [f"abandoned-{NEWEST}"] if damage.name == "manifest" else []
    every = [f"step-0000000{step}" for step in range(1, STEPS + 1)]
    assert (checkpoints(run_dir), checkpoints(without)) == ([*aside, *every], every)
    for name in (LAST_OF_ONE, LAST_OF_TWO)[: damage.ranks]:
        last = Path("checkpoints/step-00000005") / name
        assert tensor_bytes(run_dir / last) == tensor_bytes(without / last)


def test_a_run_without_damage_reports_none(went_on: Callable[[str], WentOn]) -> None:
    found = went_on("without-1")
    assert "DAMAGED" not in found.ended.output
    assert not any("damaged_checkpoints" in row for row in metrics(found.run_dir))


def test_two_damaged_ones_are_both_named(went_on: Callable[[str], WentOn]) -> None:
    found = went_on("two-damaged")
    assert found.ended.exit_codes == [0]
    assert kept(found) == 1
    rows = metrics(found.run_dir)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert [len(row.get("damaged_checkpoints", [])) for row in rows] == [0, 2, 0, 0, 0]


def test_where_none_is_sound_it_ends_and_touches_nothing(went_on: Callable[[str], WentOn]) -> None:
    found = went_on("none")
    output = found.ended.output
    assert found.ended.exit_codes == [65, 65]
    assert "Traceback" not in output
    assert sum(line.startswith("checkpoint error: ") for line in output.splitlines()) == 1
    assert all(f"step-0000000{step}" in output for step in (1, 2, 3))
    assert is_shown(output, "--resume", "auto")
    assert "--fresh" in output
    assert tree(found.run_dir) == found.before
