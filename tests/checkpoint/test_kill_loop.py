"""A run that is killed at random points again and again ends as if nothing had happened.

`make test` kills a few times, `make test-crash` as often as the variable KILLS says, through the launcher.
"""

import hashlib
import json
import os
from collections import Counter
from pathlib import Path

import pytest

from llama_mcore.checkpoint.audit import audit_run
from llama_mcore.checkpoint.layout import KINDS, complete_checkpoints
from llama_mcore.checkpoint.reader import CheckpointReader
from tests.checkpoint.crash_loop import MOST_STEPS, RANKS, Fault
from tests.conftest import Small
from tests.forked import run_worker
from tests.train.product import metrics

WORKER = Path(__file__).with_name("crash_loop.py")
FEW = 3
MANY = int(os.environ.get("KILLS", "25"))
MEASURED = {"tokens_per_s", "step_time_s", "memory_bytes"}
"""What depends on the clock and the process."""


def overrides(small: Small, kills: int) -> list[str]:
    """A run of which enough is left after every kill: beside its new steps a life may take some before the
    signal comes."""
    _, *settings = small.overrides(Path("unused"))
    return [
        *settings,
        "parallel.tp=1",
        "zero.stage=1",
        "train.precision=fp32",
        f"train.steps={2 * (MOST_STEPS + 2) * kills + 10}",
        "train.micro_batch_size=1",
        f"train.global_batch_size={RANKS}",
        "eval.interval=0",
        "checkpoint.interval=2",
        "checkpoint.asynchronous=true",
    ]


def killed(small: Small, folder: Path, kills: int, how: str) -> list[Fault]:
    settings = folder / "overrides.json"
    settings.write_text(json.dumps(overrides(small, kills)))
    run_worker(WORKER, folder, kills, how, settings, timeout=60 + 60 * kills)
    return [Fault(**fault) for fault in json.loads((folder / "faults.json").read_text())]


def check(folder: Path) -> None:
    before, last = complete_checkpoints(folder / "whole")
    assert digest(before) != digest(last)  # or what follows would show nothing
    assert digest(complete_checkpoints(folder / "killed")[-1]) == digest(last)
    assert lines(folder / "killed") == lines(folder / "whole")
    audit_run(folder / "killed")


def digest(checkpoint: Path) -> str:
    """SHA-256 over all tensors."""
    reader, sha256 = CheckpointReader(checkpoint), hashlib.sha256()
    reader.check_content()
    for name in reader.names():
        for kind in KINDS:
            sha256.update(reader.full(name, kind).numpy().data)
    return sha256.hexdigest()


def lines(run_dir: Path) -> list[dict]:
    return [{key: value for key, value in line.items() if key not in MEASURED} for line in metrics(run_dir)]


def test_a_run_that_is_killed_ends_as_one_that_is_not(small: Small, tmp_path: Path) -> None:
    assert len(killed(small, tmp_path, FEW, "forked")) == FEW
    check(tmp_path)


@pytest.mark.crash
def test_however_often_a_run_is_killed_it_ends_as_one_that_is_not(small: Small, tmp_path: Path) -> None:
    faults = killed(small, tmp_path, MANY, "torchrun")
    check(tmp_path)
    print(f"\n{'signal':20} {'to':>10} {'tried':>6} {'survived':>8}")
    for (name, target), count in sorted(Counter((fault.name, fault.target) for fault in faults).items()):
        print(f"{name:20} {target:>10} {count:6} {count:8}")
