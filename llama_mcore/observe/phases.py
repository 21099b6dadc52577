"""What this rank is doing, told to those who want to know: the watchdog, and the ledger of time."""

import time
from collections.abc import Sequence
from enum import StrEnum


class Phase(StrEnum):
    """All time of a rank belongs to one of these."""

    START = "start"
    """Imports, and the other ranks joining."""
    SETUP = "setup"
    """Data, model, engine, and the checkpoint to go on from."""
    TRAIN = "train"
    """A step, from the wait for its data to the report of it."""
    EVALUATE = "evaluate"
    SAVE = "save"
    """What training waits for of a save."""
    END = "end"
    """All is done but to leave."""


class PhaseListener:
    """One who wants to know. What it does not override it does not care about."""

    def enter(self, phase: Phase, step: int) -> None:
        """`phase` begins, of `step`; the one before has ended. Entered again, it starts from scratch."""

    def beat(self) -> None:
        """Something of the phase is done: a rank that waits for others stops beating."""

    def progress(self) -> None:
        """It goes on with something of which ranks have unequal shares, and which so tells of no rank that it
        is behind."""

    def run_dir_ready(self) -> None:
        """The run's folder is there, and is this run's."""

    def saved(self, step: int) -> None:
        """The checkpoint of `step` is on the disk."""


class Phases:
    """Every rank has one and tells it the same things."""

    def __init__(self, listeners: Sequence[PhaseListener] = (), began: float | None = None) -> None:
        """`began`: when this attempt of the run did, in seconds since 1970; now, if left out."""
        self._listeners = list(listeners)
        self.began = time.time() if began is None else began

    def add(self, listener: PhaseListener) -> None:
        self._listeners.append(listener)

    def enter(self, phase: Phase, step: int) -> None:
        """Say that `phase` begins. `step` is the one at work, counted from 1; 0 before the first."""
        for listener in self._listeners:
            listener.enter(phase, step)

    def beat(self) -> None:
        """Say that this rank got on: between what it does alone and what it does with others."""
        for listener in self._listeners:
            listener.beat()

    def progress(self) -> None:
        """Say that this rank is still at something that takes others less or longer, and no beat yet."""
        for listener in self._listeners:
            listener.progress()

    def run_dir_ready(self) -> None:
        for listener in self._listeners:
            listener.run_dir_ready()

    def saved(self, step: int) -> None:
        for listener in self._listeners:
            listener.saved(step)
