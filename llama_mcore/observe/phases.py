"""Phases of a rank, reported to listeners: the watchdog, and the timeline."""

import time
from collections.abc import Sequence
from enum import StrEnum


class Phase(StrEnum):
    """Phase of a rank; all its time belongs to one."""

    START = "start"
    """Imports, and the other ranks joining."""
    SETUP = "setup"
    """Data, model, engine, and the checkpoint to resume from."""
    TRAIN = "train"
    """A step, from the wait for its data to its report."""
    EVALUATE = "evaluate"
    SAVE = "save"
    """The part of a save that training waits for."""
    END = "end"
    """Everything after the last step."""


class PhaseListener:
    """Listener to the phases of a rank; each method that it does not override does nothing."""

    def enter(self, phase: Phase, step: int) -> None:
        """`phase` begins, of `step`; the one before has ended. Entered again, it starts from scratch."""

    def beat(self) -> None:
        """A part of the phase is done: a rank that waits for others stops beating."""

    def progress(self) -> None:
        """Work continues of which ranks have unequal shares, so that it does not tell which rank is
        behind."""

    def run_dir_ready(self) -> None:
        """The run's folder exists and belongs to this run."""

    def saved(self, step: int) -> None:
        """The checkpoint of `step` is on the disk."""


class Phases:
    """Reporter of the phases of a rank; every rank has one and reports the same."""

    def __init__(self, listeners: Sequence[PhaseListener] = (), began: float | None = None) -> None:
        """`began`: start of this attempt of the run, in seconds since 1970; default: now."""
        self._listeners = list(listeners)
        self.began = time.time() if began is None else began

    def add(self, listener: PhaseListener) -> None:
        self._listeners.append(listener)

    def enter(self, phase: Phase, step: int) -> None:
        """Report that `phase` begins. `step` is the current one, counted from 1; 0 before the first."""
        for listener in self._listeners:
            listener.enter(phase, step)

    def beat(self) -> None:
        """Report that a part is done: between work of this rank alone and work with others."""
        for listener in self._listeners:
            listener.beat()

    def progress(self) -> None:
        """Report that this rank is still at work that takes others less or more time, and no beat yet."""
        for listener in self._listeners:
            listener.progress()

    def run_dir_ready(self) -> None:
        for listener in self._listeners:
            listener.run_dir_ready()

    def saved(self, step: int) -> None:
        for listener in self._listeners:
            listener.saved(step)
