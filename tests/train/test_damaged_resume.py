"""A run whose newest checkpoint is damaged goes on from the newest sound one, and says so; else it ends."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import Small
from tests.forked import run_worker
from tests.train.product import checkpoints, metrics, tensor_bytes

WORKER = Path(__file__).with_name("two_sources.py")
STEPS = 5
NEWEST = "step-00000003"


def flip_a_bit(path: Path) -> None:
    """Of the last element: sizes, header and manifest stay as they are."""
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
    says: str


LAST_OF_ONE, LAST_OF_TWO = "rank-00000.safetensors", "rank-00001.safetensors"
DAMAGES = [
    Damage("bit", 1, flip_a_bit, LAST_OF_ONE, "is damaged: SHA-256"),
    Damage("manifest", 1, empty, "manifest.json", "cannot be read"),
    # what rank 1 alone reads
    Damage("bit-of-two", 2, flip_a_bit, LAST_OF_TWO, "is damaged: SHA-256"),
]


@dataclass(frozen=True)
class Done:
    folder: Path
    exit_codes: dict[str, list[int]]

    def said(self, name: str) -> str:
        return (self.folder / f"{name}.txt").read_text()


@pytest.fixture(scope="module")
def done(small: Small, tmp_path_factory: pytest.TempPathFactory) -> Done:
    """Runs of three steps, each with a checkpoint; copies of them, damaged; and how these went on."""
    folder = tmp_path_factory.mktemp("damaged")

    def job(name: str, ranks: int, steps: int) -> tuple[str, int, list[str]]:
        settings = [
            *small.overrides(folder / name),
            "parallel.tp=1",
            "checkpoint.interval=1",
            "checkpoint.keep=9",
            "optim.warmup_steps=1",
            "observe.tensorboard=false",
            f"train.steps={steps}",
        ]
        return name, ranks, ["train", "--config", "tiny", *settings]

    run(folder, [job(f"finished-{ranks}", ranks, 3) for ranks in (1, 2)])
    jobs = []
    for ranks in (1, 2):
        copied(folder, f"without-{ranks}", ranks, shutil.rmtree)
        jobs.append(job(f"without-{ranks}", ranks, STEPS))
    copied(folder, "none", 2, spoil_all)
    jobs.append(job("none", 2, STEPS))
    copied(folder, "two-damaged", 1, lambda newest: [empty(newest / "manifest.json"), spoil_step_2(newest)])
    jobs.append(job("two-damaged", 1, STEPS))
    for damage in DAMAGES:
        copied(
            folder,
            damage.name,
            damage.ranks,
            lambda newest, damage=damage: damage.spoil(newest / damage.file),
        )
        jobs.append(job(damage.name, damage.ranks, STEPS))
    shutil.copytree(folder / "none", folder / "none-before")
    return Done(folder, run(folder, jobs))


def spoil_step_2(newest: Path) -> None:
    cut(newest.with_name("step-00000002") / LAST_OF_ONE)


def spoil_all(newest: Path) -> None:
    """Each in another way."""
    flip_a_bit(newest / LAST_OF_ONE)
    spoil_step_2(newest)
    empty(newest.with_name("step-00000001") / "manifest.json")


def copied(folder: Path, name: str, ranks: int, spoil: Callable[[Path], object]) -> None:
    shutil.copytree(folder / f"finished-{ranks}", folder / name)
    spoil(folder / name / "checkpoints" / NEWEST)


def run(folder: Path, jobs: list[tuple[str, int, list[str]]]) -> dict[str, list[int]]:
    (folder / "jobs.json").write_text(json.dumps(jobs))
    run_worker(WORKER, folder, folder / "jobs.json")
    return json.loads((folder / "exit_codes.json").read_text())


def losses(run_dir: Path) -> dict[int, tuple[float, float]]:
    return {row["step"]: (row["loss"], row["grad_norm"]) for row in metrics(run_dir)}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.name)
def test_it_goes_on_from_the_newest_sound_one_and_says_so(done: Done, damage: Damage) -> None:
    said, run_dir = done.said(damage.name), done.folder / damage.name
    assert done.exit_codes[damage.name] == [0] * damage.ranks, said
    assert f"{NEWEST} IS DAMAGED and passed over: checkpoint error: " in said
    assert damage.says in said
    assert "resuming at step 2" in said
    rows = metrics(run_dir)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    (reported,) = rows[2]["damaged_checkpoints"]
    assert damage.says in reported
    assert f"{NEWEST}/{damage.file}" in reported
    assert not any("damaged_checkpoints" in row for row in rows if row["step"] != 3)


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.name)
def test_the_result_is_that_of_a_run_resumed_from_there(done: Done, damage: Damage) -> None:
    without, run_dir = done.folder / f"without-{damage.ranks}", done.folder / damage.name
    assert losses(run_dir) == losses(without)
    assert (
        checkpoints(run_dir)
        == checkpoints(without)
        == [f"step-0000000{step}" for step in range(1, STEPS + 1)]
    )
    for name in (LAST_OF_ONE, LAST_OF_TWO)[: damage.ranks]:
        last = Path("checkpoints/step-00000005") / name
        assert tensor_bytes(run_dir / last) == tensor_bytes(without / last)


def test_a_run_without_damage_reports_none(done: Done) -> None:
    assert "DAMAGED" not in done.said("without-1")
    assert not any("damaged_checkpoints" in row for row in metrics(done.folder / "without-1"))


def test_two_damaged_ones_are_both_named(done: Done) -> None:
    assert done.exit_codes["two-damaged"] == [0]
    assert "resuming at step 1" in done.said("two-damaged")
    rows = metrics(done.folder / "two-damaged")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert [len(row.get("damaged_checkpoints", [])) for row in rows] == [0, 2, 0, 0, 0]


def test_where_none_is_sound_it_ends_and_touches_nothing(done: Done) -> None:
    said = done.said("none")
    assert done.exit_codes["none"] == [65, 65]
    assert "Traceback" not in said
    assert sum(line.startswith("checkpoint error: ") for line in said.splitlines()) == 1
    assert all(f"step-0000000{step}" in said for step in (1, 2, 3))
    assert "restore one, or begin anew with --fresh" in said
    assert tree(done.folder / "none") == tree(done.folder / "none-before")


def tree(folder: Path) -> dict[str, bytes]:
    """Files with their content; not the lease, which tells who was there."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    named = {str(path.relative_to(folder)): path for path in paths}
    return {name: path.read_bytes() for name, path in named.items() if not name.startswith("lease")}
