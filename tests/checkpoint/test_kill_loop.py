"""A run that is killed at random points again and again ends as if nothing had happened.

`make test` kills a few times, `make test-crash` as often as the variable KILLS says, through the launcher.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from llama_mcore.checkpoint.audit import audit_run
from llama_mcore.checkpoint.paths import KINDS
from llama_mcore.checkpoint.reader import CheckpointReader
from llama_mcore.checkpoint.run_dir import complete_checkpoints
from tests.checkpoint.crash_loop import MOST_STEPS, RANKS, Attempt, Fault, Forked, Launched, run_to_the_end
from tests.support.models import Small
from tests.support.product import metrics

pytestmark = pytest.mark.process
FEW = 3
MANY = int(os.environ.get("KILLS", "25"))
MEASURED = {"tokens_per_s", "step_time_s", "memory_bytes", "attempt"}
"""Fields that depend on the clock and the process."""


def settings(kills: int) -> list[str]:
    """Settings of a run with enough steps left after every kill, since an attempt may do some before the
    signal comes."""
    return [
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


def killed(small: Small, run_dir: Path, kills: int, begin: Callable[[list[str]], Attempt]) -> list[Fault]:
    words = [*small.overrides(run_dir), *settings(kills)]
    return run_to_the_end(partial(begin, words), run_dir, kills)


def check(run_dir: Path, undisturbed: Path) -> None:
    before, last = complete_checkpoints(undisturbed)
    assert digest(before) != digest(last)  # or what follows would show nothing
    assert digest(complete_checkpoints(run_dir)[-1]) == digest(last)
    assert lines(run_dir) == lines(undisturbed)
    audit_run(run_dir)


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


def test_a_run_that_is_killed_ends_as_one_that_is_not(
    small: Small, tmp_path: Path, uninterrupted: Callable[..., Path]
) -> None:
    run_dir = tmp_path / "run"
    assert killed(small, run_dir, FEW, Forked)
    check(run_dir, uninterrupted(settings(FEW)))


@pytest.mark.crash
def test_however_often_a_run_is_killed_it_ends_as_one_that_is_not(
    small: Small, tmp_path: Path, uninterrupted: Callable[..., Path]
) -> None:
    run_dir = tmp_path / "run"
    faults = killed(small, run_dir, MANY, Launched)
    check(run_dir, uninterrupted(settings(MANY)))
    print(f"\n{'signal':20} {'to':>10} {'tried':>6} {'survived':>8}")
    for (name, target), count in sorted(Counter((fault.name, fault.target) for fault in faults).items()):
        print(f"{name:20} {target:>10} {count:6} {count:8}")
