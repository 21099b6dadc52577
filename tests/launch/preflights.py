"""Worker: a preflight of two forked ranks in every condition that test_preflight.py looks at.

    python tests/launch/preflights.py FOLDER SETTING ...

The settings are overrides of --config tiny. Rank r of case NAME leaves in FOLDER/NAME-r.json its exit code
and what was found; what it printed is in NAME-r.txt.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import NoReturn
from unittest.mock import patch

import torch.distributed as dist

from llama_mcore.checkpoint.layout import step_dir
from llama_mcore.checkpoint.manifest import Layout, Manifest, RankFile, manifest_bytes
from llama_mcore.config import RunConfig, load_run
from llama_mcore.errors import UserError
from llama_mcore.launch import all_reduce, node_checks, preflight, run_checks, versions
from llama_mcore.launch.finding import Finding
from llama_mcore.launch.progress import LIVES
from llama_mcore.observe.lives import EndedLife, add_life
from llama_mcore.plan.search import memory_of
from llama_mcore.train import alike
from tests.forked import run_ranks, write_output_to


def main() -> None:
    folder, settings = Path(sys.argv[1]), sys.argv[2:]
    run = load_run("tiny", settings)
    memory = memory_of(run, 2)
    certain = memory.state.total + memory.saved_layers + memory.saved_rest
    # What differs on rank 1, which is the second node.
    cases: dict[str, Callable[[], object]] = {
        "sound": partial(look, folder, settings, []),
        "dp": partial(look, folder, [*settings, "parallel.tp=1"], []),
        "other-folder": partial(look, folder, settings, [], run_folder=folder / "elsewhere" / "run"),
        "no-data": partial(look, folder, settings, [], train=str(folder / "nothing")),
        "other-data": partial(look, folder, settings, [], train=run.data.valid),
        "other-settings": partial(look, folder, settings, ["optim.lr=0.5"]),
        "another-ds-file": partial(look, folder, settings, [], ds_file={"prescale_gradients": True}),
        "too-little-data": partial(look, folder, [*settings, "train.steps=100000"], []),
        "unwritable": partial(look, folder, [*settings, f"run.dir={folder / 'file' / 'run'}"], []),
        "version": partial(look, folder, settings, [], numpy="1.0"),
        "checkout": partial(look, folder, settings, [], sources=folder / "checkout"),
        "clock": partial(look, folder, settings, [], clock_ahead=60.0),
        "full": partial(look, folder, settings, [], free=1000),
        "memory": partial(look, folder, settings, [], memory=memory.state.total + 1),
        "tight": partial(look, folder, settings, [], memory=certain + 1),
        "wrong-sum": partial(look, folder, settings, [], wrong_sum=True),
        "data-hangs": partial(look, folder, settings, [], hangs="data"),
        "folder-hangs": partial(look, folder, settings, [], hangs="run_folder"),
        "start-hangs": partial(look, folder, settings, [], start_hangs=True),
        "json": partial(look, folder, settings, [], as_json=True),
    }
    (folder / "file").touch()
    (folder / "checkout").mkdir()
    for name, prepare in PREPARED.items():
        run_dir = folder / "prepared" / name
        run_dir.mkdir(parents=True)
        prepare(run_dir, run)
        there = [*settings, f"run.dir={run_dir}"]
        cases[name] = partial(look, folder, there, [])
    three_layers = [*there, f"run.dir={folder / 'prepared' / 'continues'}", "model.num_layers=3"]
    fruitless, foreign = (
        [*there, f"run.dir={folder / 'prepared' / name}"] for name in ("no-progress", "foreign")
    )
    cases["another-model"] = partial(look, folder, three_layers, [])
    cases["retried"] = partial(look, folder, fruitless, [], retry=True)
    cases["not-auto"] = partial(look, folder, foreign, [], auto=False)
    for name, case in cases.items():
        run_ranks(2, partial(record, folder, name, case))


def checkpoint(run_dir: Path, run: RunConfig, step: int) -> Path:
    """As far as its manifest and the sizes of its files show."""
    folder = step_dir(run_dir, step)
    folder.mkdir(parents=True)
    (folder / "rank-00000.safetensors").write_bytes(b"x" * 10)
    file = RankFile(name="rank-00000.safetensors", tp_rank=0, bytes=10, sha256="0" * 64)
    manifest = Manifest(
        run_id="r",
        step=step,
        consumed_samples=8 * step,
        lr=0.1,
        segments=(),
        windows_read={},
        config=run.model_dump(mode="json"),
        layout=Layout(tp=1, dp=1, zero_stage=1),
        files=(file,),
    )
    (folder / "manifest.json").write_bytes(manifest_bytes(manifest))
    return folder


def two_checkpoints(run_dir: Path, run: RunConfig) -> None:
    for step in (2, 4):
        checkpoint(run_dir, run, step)


def newest_damaged(run_dir: Path, run: RunConfig) -> None:
    two_checkpoints(run_dir, run)
    (step_dir(run_dir, 4) / "rank-00000.safetensors").write_bytes(b"x" * 9)


def no_sound_checkpoint(run_dir: Path, run: RunConfig) -> None:
    (checkpoint(run_dir, run, 4) / "rank-00000.safetensors").unlink()


def foreign(run_dir: Path, run: RunConfig) -> None:
    (run_dir / "thesis.txt").touch()


def in_use(run_dir: Path, run: RunConfig) -> None:
    (run_dir / "lease").mkdir()
    holder = {"host": "elsewhere", "pid": 1, "started": 0.0, "job": ""}
    (run_dir / "lease" / "00000001.json").write_text(json.dumps(holder))


def no_progress(run_dir: Path, run: RunConfig) -> None:
    life = EndedLife(
        began=1.0, ended=2.0, job="", host="n", ranks=1, exit_code=137, asked=False, saved=False, step=0
    )
    for _ in range(LIVES):
        add_life(run_dir, life)


PREPARED = {
    "continues": two_checkpoints,
    "newest-damaged": newest_damaged,
    "no-sound-checkpoint": no_sound_checkpoint,
    "foreign": foreign,
    "in-use": in_use,
    "no-progress": no_progress,
}
"""What lies in a run's folder before."""


def record(folder: Path, name: str, case: Callable[[], object]) -> None:
    rank = os.environ["RANK"]
    write_output_to(folder / f"{name}-{rank}.txt")
    found: dict[str, object] = {"exit_code": 0}
    real = preflight.examine

    def examine(*arguments: object) -> object:
        findings = real(*arguments)  # type: ignore[arg-type]
        found["findings"] = [asdict(finding) for finding in findings]
        return findings

    with patch.object(preflight, "examine", examine):
        try:
            case()
        except UserError as error:
            found |= {"exit_code": error.exit_code, "problems": [str(problem) for problem in error.problems]}
    (folder / f"{name}-{rank}.json").write_text(json.dumps(found))


def look(
    folder: Path,
    settings: list[str],
    more_on_rank_1: list[str],
    *,
    as_json: bool = False,
    numpy: str = "",
    sources: Path | None = None,
    clock_ahead: float = 0.0,
    free: int = 0,
    memory: int = 0,
    wrong_sum: bool = False,
    run_folder: Path | None = None,
    train: str = "",
    ds_file: dict[str, object] | None = None,
    hangs: str = "",
    start_hangs: bool = False,
    auto: bool = True,
    retry: bool = False,
) -> None:
    here = os.environ["RANK"] == "1"
    start = partial(run_checks.start, auto=auto, retry=retry)
    run = load_run("tiny", settings + more_on_rank_1 * here)
    version, now, usage, reduce = (
        versions.metadata.version,
        time.time,
        node_checks.shutil.disk_usage,
        (dist.all_reduce),
    )
    patches = [patch.object(preflight.socket, "gethostname", lambda: f"n{1 + here}")]
    if numpy:
        patches.append(
            patch.object(
                versions.metadata, "version", lambda name: numpy if name == "numpy" else version(name)
            )
        )
    if sources:
        patches.append(patch.object(versions, "SOURCES", sources))
    if clock_ahead:
        patches.append(patch.object(preflight.time, "time", lambda: now() + clock_ahead))
    if free:
        patches.append(
            patch.object(node_checks.shutil, "disk_usage", lambda path: usage(path)._replace(free=free))
        )
    if memory:
        patches.append(patch.object(node_checks, "memory_limit", lambda: memory))
    if run_folder:

        def another_folder(path: Path, rank: int, mark: str) -> Finding:
            return node_checks.run_folder(run_folder, rank, mark, wait_s=1.0)

        patches.append(patch.object(preflight, "run_folder", another_folder))
    if train:
        changed = run.changed(data={"train": train})
        patches.append(patch.object(preflight, "data", lambda _: run_checks.data(changed)))
    if ds_file:
        patches.append(patch.object(alike, "read_ds_file", lambda _: (Path(), ds_file)))
    if hangs:
        patches.append(patch.object(preflight, hangs, hang))
    if wrong_sum:

        def off_by_one(tensor: object, *arguments: object, **options: object) -> None:
            reduce(tensor, *arguments, **options)  # type: ignore[arg-type]
            tensor.view(-1)[0] += 1  # type: ignore[attr-defined]

        patches.append(patch.object(all_reduce.dist, "all_reduce", off_by_one))
    for one in patches if here or wrong_sum else patches[:1]:
        one.start()
    if hangs or start_hangs:
        preflight.LIMIT_S = 1.0
    preflight.preflight(run, as_json, hang if start_hangs else start)


def hang(*_: object) -> NoReturn:
    threading.Event().wait()
    raise AssertionError


if __name__ == "__main__":
    main()
