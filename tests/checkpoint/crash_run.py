"""A run of two ranks that does nothing but save, in milliseconds, and what is found of it after a fault.

A version of its state has other bits in every tensor and says its number in the manifest, so that a mixture
of two shows. The engine offers what a Saver looks at, without DeepSpeed: at ZeRO stage 0 that is the module
and its optimizer.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine
from torch import Tensor, nn

from llama_mcore.checkpoint import durable_io
from llama_mcore.checkpoint.paths import KINDS, checkpoints_dir
from llama_mcore.checkpoint.reader import CheckpointReader
from llama_mcore.checkpoint.saver import Saver
from llama_mcore.checkpoint.start import Start
from llama_mcore.checkpoint.train_state import TrainState
from llama_mcore.config.schema import RunConfig
from llama_mcore.distributed.groups import Groups, model_parallel_groups
from llama_mcore.model.sharding import parameter_shapes, shard, split_of
from llama_mcore.observe.phases import Phases
from llama_mcore.train.resume import find_start
from tests.support import models

RANKS = 2
RUN_ID = "a" * 32

SHAPE = models.PLAIN | {
    "num_layers": 1,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "ffn_hidden_size": 32,
    "vocab_size": 32,
}

Save = tuple[int, int]
"""(step, version)."""
SAVES: list[Save] = [(1, 1), (2, 2), (2, 3), (3, 4)]
"""The first of a run, one that replaces another, one of the same step again, and one after that."""
LAST: Save = (9, 9)
"""The save that follows a fault."""


def run_config(run_dir: Path, keep: int = 1) -> RunConfig:
    return models.run_config(
        run_dir,
        SHAPE,
        parallel={"tp": RANKS},
        zero={"stage": 0},
        train={"micro_batch_size": 1, "global_batch_size": 1},
        checkpoint={"keep": keep, "timeout_s": 600},
    )


@cache
def content(version: int) -> dict[tuple[str, str], Tensor]:
    """Every tensor of a version; no element is that of another tensor or version."""
    tensors, first = {}, version << 16
    for name, shape in parameter_shapes(run_config(Path("unused")).model).items():
        for kind in KINDS:
            tensors[name, kind] = torch.arange(first, first + shape.numel(), dtype=torch.float32).view(shape)
            first += shape.numel()
    assert first < (version + 1) << 16
    return tensors


class Engine:
    """One rank's module and optimizer, filled with a version."""

    def __init__(self, groups: Groups) -> None:
        self._groups = groups
        self.module = nn.Module()
        self.optimizer = torch.optim.AdamW([torch.zeros(1)])
        self.broken_at = -1
        self.fill(0)

    def fill(self, version: int) -> None:
        self.version, named = version, {}
        for (name, kind), full in content(version).items():
            part = shard(full, split_of(name), self._groups.tp_rank, self._groups.tp_size).contiguous()
            if kind == KINDS[0]:
                named[name] = nn.Parameter(part)
            self.optimizer.state[named[name]][kind] = part
        self.module.named_parameters = lambda: named.items()  # type: ignore[assignment, method-assign]

    def zero_optimization_stage(self) -> int:
        if self.version == self.broken_at:
            raise RuntimeError("the device is gone")
        return 0


@contextmanager
def joined() -> Iterator[Groups]:
    """The groups of a forked rank."""
    dist.init_process_group("gloo")
    with model_parallel_groups(run_config(Path("unused")).parallel, 0, torch.device("cpu")) as groups:
        yield groups
        dist.barrier()


@dataclass
class Rank:
    """One rank that saves versions to a run folder."""

    run_dir: Path
    groups: Groups
    keep: int = 1
    engine: Engine = field(init=False)
    saver: Saver = field(init=False)

    def __post_init__(self) -> None:
        self.engine = Engine(self.groups)
        run = run_config(self.run_dir, self.keep)
        self.saver = Saver(cast(DeepSpeedEngine, self.engine), run, self.groups)

    def save(self, step: int, version: int) -> None:
        """Save a version, which is acknowledged when this returns. Raises OutputError."""
        self.engine.fill(version)
        self.saver.begin(TrainState(step, version, run_id=RUN_ID), lr=0.0)
        assert self.saver.finish()

    def newest(self) -> int:
        """Version of the checkpoint that a run would resume from; 0 if it would start from scratch.

        Raises what the run would, and AssertionError for a mixture.
        """
        found = find_start(run_config(self.run_dir, self.keep), Start(), self.groups, Phases())
        return version_of(found.reader) if found.reader else 0


def version_of(reader: CheckpointReader) -> int:
    version = reader.state.consumed_samples
    for (name, kind), expected in content(version).items():
        assert torch.equal(reader.full(name, kind), expected), f"{kind} of {name} is not that of {version}"
    return version


def names_in(run_dir: Path) -> list[str]:
    """Names in the folder of checkpoints, temporary ones included."""
    return sorted(path.name for path in checkpoints_dir(run_dir).iterdir())


class Watch:
    """Counts this rank's operations on the disk and has something happen before one of them."""

    def __init__(self, at: int = 0, act: Callable[[], None] = lambda: None) -> None:
        self.operations: list[str] = []
        self.fired = False
        self._at, self._act = at, act

    def __call__(self, operation: str, path: Path) -> None:
        self.operations.append(f"{operation} {path.name}")
        if len(self.operations) == self._at:
            self.fired = True
            self._act()


@contextmanager
def watched(watch: Watch, *, agreements: bool = False) -> Iterator[Watch]:
    """Have the disk tell `watch`; with `agreements`, of every exchange between the ranks too."""
    gather = dist.all_gather_object

    def told(*args: Any, **kwargs: Any) -> None:
        watch("agree", Path("ranks"))
        gather(*args, **kwargs)

    durable_io.observer = watch
    if agreements:
        dist.all_gather_object = told
    try:
        yield watch
    finally:
        durable_io.observer = lambda operation, path: None
        dist.all_gather_object = gather
