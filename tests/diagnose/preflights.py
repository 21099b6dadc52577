"""A preflight of forked ranks in every condition that test_preflight.py looks at."""

import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from llama_mcore.background import run_with_timeout
from llama_mcore.checkpoint.manifest import Layout, Manifest, RankFile, manifest_bytes
from llama_mcore.checkpoint.paths import step_dir
from llama_mcore.checkpoint.run_dir import new_lineage, write_lineage
from llama_mcore.checkpoint.start import Start
from llama_mcore.config.load import load_config
from llama_mcore.config.schema import RunConfig
from llama_mcore.diagnose import allreduce, checks_node, checks_run, preflight
from llama_mcore.diagnose.finding import Finding
from llama_mcore.errors import LlamaMcoreError, Problem
from llama_mcore.observe.goodput.attempts import MAX_FRUITLESS, AttemptEnded, add_attempt
from llama_mcore.plan.layout.footprint import memory_of
from llama_mcore.train import consistency
from tests.support.world import run_ranks, write_output_to

Changes = tuple[tuple[object, str, object], ...]
"""Of attributes: whose, which, and what they become. A rank ends with its case."""
SPEEDS = {"ranks": (40, 41, 42, 4), "tp": (40, 40, 13, 13), "dp": (40, 21, 40, 21)}
"""GB/s that the ranks of the case "slow-group" measure, tp 2 x dp 2."""


@dataclass(frozen=True)
class Case:
    settings: list[str]
    """Overrides of --config tiny."""
    on_rank_1: Changes = ()
    """Rank 1 is the second node."""
    of_rank_1: tuple[str, ...] = ()
    """More overrides."""
    everywhere: Changes = ()
    start: preflight.StartCheck = checks_run.start
    as_json: bool = False
    ranks: int = 2


@dataclass(frozen=True)
class Seen:
    """Findings and exit of a rank."""

    exit_code: int
    findings: list[Finding]
    problems: list[Problem]
    output: str = field(compare=False)


def look_at_all(folder: Path, settings: list[str]) -> dict[str, list[Seen]]:
    """Name of a case -> what each rank came to."""
    return {
        name: run_ranks(case.ranks, look, case, folder / name)
        for name, case in cases(folder, settings).items()
    }


def look(case: Case, output: Path) -> Seen:
    rank = int(os.environ["RANK"])
    output = output.with_suffix(f".{rank}")
    write_output_to(output)
    for owner, name, value in [*case.everywhere, *(case.on_rank_1 if rank == 1 else ())]:
        setattr(owner, name, value)
    allreduce.BYTES = 64_000  # how fast they are is no matter here
    socket.gethostname = lambda: f"n{1 + rank}"
    exit_code, findings, problems, examine = 0, [], [], preflight.examine

    def observed(*arguments: Any) -> list[Finding]:
        findings.extend(examine(*arguments))
        return findings

    preflight.examine = observed
    try:
        run = load_config("tiny", [*case.settings, *(case.of_rank_1 if rank == 1 else ())])
        preflight.preflight(run, case.as_json, case.start)
    except LlamaMcoreError as error:
        exit_code, problems = error.exit_code, error.problems
    return Seen(exit_code, findings, problems, output.read_text())


def cases(folder: Path, settings: list[str]) -> dict[str, Case]:
    run = load_config("tiny", settings)
    memory = memory_of(run, 2)
    certain = memory.state.total + memory.saved_layers + memory.saved_rest
    (folder / "file").touch()
    (folder / "checkout").mkdir()
    in_prepared = {name: [*settings, f"run.dir={prepared(folder, name, run)}"] for name in PREPARED}
    return {
        **{name: Case(there) for name, there in in_prepared.items()},
        "sound": Case(settings),
        "dp": Case([*settings, "parallel.tp=1"]),
        "json": Case(settings, as_json=True),
        "other-folder": Case(settings, (sees_another_folder(folder / "elsewhere" / "run"),)),
        "no-data": Case(settings, (reads(run, folder / "nothing"),)),
        "other-data": Case(settings, (reads(run, run.data.valid),)),
        "other-settings": Case(settings, of_rank_1=("optim.lr=0.5",)),
        "another-ds-file": Case(
            settings, ((consistency, "read_ds_file", lambda _: (Path(), {"prescale_gradients": True})),)
        ),
        "too-little-data": Case([*settings, "train.steps=100000"]),
        "unwritable": Case([*settings, f"run.dir={folder / 'file' / 'run'}"]),
        "version": Case(settings, (has_numpy("1.0"),)),
        "checkout": Case(settings, ((checks_node, "SOURCES", folder / "checkout"),)),
        "clock": Case(settings, (clock_ahead(60.0),)),
        "full": Case(settings, (has_free(1000),)),
        "memory": Case(settings, ((checks_node, "memory_limit", lambda: memory.state.total + 1),)),
        "tight": Case(settings, ((checks_node, "memory_limit", lambda: certain + 1),)),
        "wrong-sum": Case(settings, everywhere=(adds_wrong(),)),
        "data-hangs": Case(settings, ((preflight, "data", hang), gives_up(preflight.DATA))),
        "folder-hangs": Case(settings, ((preflight, "run_folder", hang), gives_up(preflight.FOLDER))),
        "start-hangs": Case(settings, everywhere=(gives_up(preflight.START),), start=hang),
        "another-model": Case([*in_prepared["continues"], "model.num_layers=3"]),
        "retried": Case(in_prepared["no-progress"], start=partial(checks_run.start, retry=True)),
        "fresh": Case(in_prepared["foreign"], start=partial(checks_run.start, request=Start(fresh=True))),
        "slow-group": Case(settings, everywhere=((preflight, "all_reduce_speed", measured),), ranks=4),
    }


def reads(run: RunConfig, data: object) -> tuple[object, str, object]:
    changed = run.changed(data={"train": str(data)})
    return preflight, "data", lambda _: checks_run.data(changed)


def sees_another_folder(run_dir: Path) -> tuple[object, str, object]:
    def run_folder(path: Path, rank: int, mark: str) -> Finding:
        return checks_node.run_folder(run_dir, rank, mark, wait_s=1.0)

    return preflight, "run_folder", run_folder


def has_numpy(numpy: str) -> tuple[object, str, object]:
    version = checks_node.metadata.version
    return checks_node.metadata, "version", lambda name: numpy if name == "numpy" else version(name)


def clock_ahead(seconds: float) -> tuple[object, str, object]:
    now = time.time
    return time, "time", lambda: now() + seconds


def has_free(free: int) -> tuple[object, str, object]:
    usage = shutil.disk_usage
    return shutil, "disk_usage", lambda path: usage(path)._replace(free=free)


def adds_wrong() -> tuple[object, str, object]:
    reduce = dist.all_reduce

    def off_by_one(tensor: torch.Tensor, *arguments: Any, **options: Any) -> None:
        reduce(tensor, *arguments, **options)
        tensor.view(-1)[0] += 1

    return allreduce.dist, "all_reduce", off_by_one


def measured(_: torch.device, group: dist.ProcessGroup | None = None) -> float:
    ranks = dist.get_process_group_ranks(group)
    kind = "ranks" if len(ranks) == 4 else "tp" if ranks[1] - ranks[0] == 1 else "dp"
    return SPEEDS[kind][dist.get_rank()] * 1e9


def gives_up(hanging: tuple[str, str]) -> tuple[object, str, object]:
    """Soon on the check that hangs; the others may be slow."""

    def run(limit_s: float, checks: Mapping[tuple[str, str], preflight.Check]) -> dict:
        others = {name: check for name, check in checks.items() if name != hanging}
        hung = {name: checks[name] for name in checks.keys() - others}
        return run_with_timeout(limit_s, others) | run_with_timeout(1.0, hung)

    return preflight, "run_with_timeout", run


def hang(*_: object) -> NoReturn:
    threading.Event().wait()
    raise AssertionError


def prepared(folder: Path, name: str, run: RunConfig) -> Path:
    run_dir = folder / "prepared" / name
    run_dir.mkdir(parents=True)
    PREPARED[name](run_dir, run)
    return run_dir


def checkpoint(run_dir: Path, run: RunConfig, step: int) -> Path:
    """A checkpoint, as far as its manifest and the sizes of its files show, of a run that has begun there."""
    write_lineage(run_dir, new_lineage("r"))
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
    holder = {"host": "elsewhere", "pid": 1, "boot": "b", "namespace": "n", "ticks": 0, "job": ""}
    (run_dir / "lease" / "00000001.json").write_text(json.dumps(holder))


def no_progress(run_dir: Path, run: RunConfig) -> None:
    attempt = AttemptEnded(
        began=1.0, ended=2.0, job="", host="n", ranks=1, exit_code=137, asked=False, saved=False, step=0
    )
    for _ in range(MAX_FRUITLESS):
        add_attempt(run_dir, attempt)


PREPARED: dict[str, Callable[[Path, RunConfig], None]] = {
    "continues": two_checkpoints,
    "newest-damaged": newest_damaged,
    "no-sound-checkpoint": no_sound_checkpoint,
    "foreign": foreign,
    "in-use": in_use,
    "no-progress": no_progress,
}
"""What lies in a run's folder before."""
