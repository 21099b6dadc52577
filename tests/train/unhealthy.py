"""Runs on two ranks whose loss goes wrong on some of their data, killed now and then."""

import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llama_mcore.checkpoint.manifest import manifest_bytes, read_manifest
from llama_mcore.checkpoint.paths import MANIFEST, step_dir
from llama_mcore.config.load import load_config
from llama_mcore.config.schema import RunConfig
from llama_mcore.data.loader import Samples
from llama_mcore.data.sources import open_sources, plan_run
from llama_mcore.errors import report_errors
from llama_mcore.observe.phases import Phase, PhaseListener, Phases
from llama_mcore.train import trainer
from llama_mcore.train.setup import train
from llama_mcore.train.step import Step
from llama_mcore.train.trainer import Trainer
from llama_mcore.watchdog.signals import StopRequest
from tests.support.world import exit_codes_of, write_output_to

archive = Trainer._archive_abandoned_steps
KILLED = 9


@dataclass(frozen=True)
class Run:
    bad: tuple[int, int] = (0, 0)
    """Samples [first, end) on which the loss goes wrong on the last rank."""
    add: float = float("nan")
    """What is added to it."""
    kills: tuple[int | str, ...] = ()
    """When each attempt but the last ends: in its n-th call of a step, or in its first "rollback"."""
    stops: tuple[int, ...] = ()
    """The same for attempts that are asked to stop: in which call, after the kills."""
    flip_after: int = 0
    """The call after which a bit of a norm weight is wrong on the last rank."""
    left_out: int = 0
    """A step whose update is never even computed."""


@dataclass(frozen=True)
class Lived:
    """Remains of a run in a folder: the run, and files beside it."""

    folder: Path

    @property
    def run_dir(self) -> Path:
        return self.folder / "run"

    @property
    def output(self) -> str:
        return (self.folder / "output.txt").read_text()

    @property
    def exit_codes(self) -> list[list[int]]:
        """Exit codes of both ranks in each attempt."""
        return json.loads((self.folder / "exit_codes.json").read_text())

    @property
    def discarded(self) -> list[int]:
        """Numbers of the steps that each attempt discarded after they had begun."""
        path = self.folder / "discarded.txt"
        return [int(line) for line in path.read_text().split()] if path.exists() else []

    def phases(self, rank: int) -> list[list[Any]]:
        """Phases that the run reported in its last attempt, as `Told` has them."""
        return json.loads((self.folder / f"phases-{rank}.json").read_text())


def all_attempts(folder: Path, overrides: list[str], asked: Run) -> None:
    """All attempts of the run, one after the other."""
    run = load_config("tiny", overrides)
    ends: list[tuple[int | str | None, int]] = [(kill, 0) for kill in asked.kills]
    ends += [(None, stop) for stop in asked.stops]
    exit_codes = [exit_codes_of(2, live, folder, run, asked, *end) for end in (*ends, (None, 0))]
    (folder / "exit_codes.json").write_text(json.dumps(exit_codes))


def live(folder: Path, run: RunConfig, asked: Run, kill: int | str | None, stop_in: int) -> None:
    write_output_to(folder / "output.txt")
    stop = StopRequest()
    trainer.Step = faulty_step(folder, bad_windows(run, asked.bad), asked, kill, stop, stop_in)  # type: ignore[misc]
    if kill == "rollback":
        Trainer._archive_abandoned_steps = lambda self: (archive(self), os._exit(KILLED))  # type: ignore[method-assign, assignment, func-returns-value]
    told = Told()
    with report_errors():
        exit_code = train(run, stop, phases=Phases([told]))
        (folder / f"phases-{os.environ['RANK']}.json").write_text(json.dumps(told.entries))
        sys.exit(exit_code)


class Told(PhaseListener):
    """Phase, step, and how often in it the rank beat and how often it worked on."""

    def __init__(self) -> None:
        self.entries: list[list[Any]] = []

    def enter(self, phase: Phase, step: int) -> None:
        self.entries.append([phase, step, 0, 0])

    def beat(self) -> None:
        self.entries[-1][2] += 1

    def progress(self) -> None:
        self.entries[-1][3] += 1


def faulty_step(
    folder: Path, bad: set[bytes], asked: Run, kill: int | str | None, stop: StopRequest, stop_in: int
) -> type[Step]:
    finished, discarded = count(1), count(1)

    class FaultyStep(Step):
        def _forward(self, number: int) -> Tensor:
            with wrong_loss(self._engine.module, bad, asked.add):
                return super()._forward(number)

        def finish(self, *arguments: Any) -> Tensor:
            calls = next(finished)
            if calls == kill:
                os._exit(KILLED)
            if calls == stop_in:
                stop.note(signal.SIGTERM, None)
            if calls == asked.left_out:
                self.discard()
                return torch.tensor([float("nan"), float("nan"), 1.0], dtype=torch.float64)
            numbers = super().finish(*arguments)
            if calls == asked.flip_after and os.environ["RANK"] == "1":
                norm = self._engine.module.get_parameter("decoder.final_layernorm.weight")
                norm.detach().view(torch.int16)[0] ^= 1
            return numbers

        def discard(self) -> None:
            super().discard()
            if os.environ["RANK"] == "0":
                with (folder / "discarded.txt").open("a") as file:
                    print(next(discarded), file=file)

    return FaultyStep


@contextmanager
def wrong_loss(module: Any, bad: set[bytes], add: float) -> Iterator[None]:
    """Add to the loss of a batch that holds a bad window, on the rank that reads it."""

    def spoil(_: Any, arguments: tuple, loss: Any) -> Any:
        rows = arguments[0].numpy()
        return loss + add if any(row.tobytes() in bad for row in rows) else loss

    hook = module.register_forward_hook(spoil)
    try:
        yield
    finally:
        hook.remove()


def bad_windows(run: RunConfig, bad: tuple[int, int]) -> set[bytes]:
    sources = open_sources(run.data, run.model.seq_length, run.model.vocab_size)
    plan = plan_run(run.data, sources, run.run.seed, run.model.seq_length)
    if bad[0] == bad[1]:
        return set()
    ids = Samples(plan, tuple(source.train for source in sources)).read(np.arange(*bad))
    return {row[:-1].astype(np.int64).tobytes() for row in ids}


def moved_on(run_dir: Path, other: Path, step: int, sample: int) -> None:
    """Make a run that stands at `step` of another one, and at another place of the data."""
    there, here = step_dir(other, step), step_dir(run_dir, step)
    here.mkdir(parents=True)
    for path in there.iterdir():
        (here / path.name).write_bytes(path.read_bytes())
    manifest = read_manifest(here)
    moved = {"consumed_samples": sample, "windows_read": manifest.segments[-1].used(sample)}
    (here / MANIFEST).write_bytes(manifest_bytes(manifest.model_copy(update=moved)))
