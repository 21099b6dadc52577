"""State of a run besides weights and optimizer: all that it needs to go on exactly where it stopped."""

from dataclasses import dataclass, field
from typing import Annotated

from pydantic import Field

from llama_mcore.config.section import Section
from llama_mcore.data.data_plan import Segment

Count = Annotated[int, Field(ge=0)]


class Origin(Section):
    """A checkpoint whose weights a run began with."""

    path: str
    run_id: str
    """Id of the run that wrote it."""
    step: Count
    manifest_sha256: str
    """SHA-256 of manifest.json, which has the hashes of all other files."""


class Rollback(Section):
    """A return to a checkpoint, and the samples that were read since then and abandoned."""

    at_step: Count
    """The last step that was abandoned."""
    to_step: Count
    """The step of the checkpoint."""
    first_sample: Count
    end_sample: Count
    """The samples [first_sample, end_sample) count as read, and are not read again."""
    reason: str


class HealthState(Section):
    """Memory of train/health.py. It depends on the run's steps alone, so that a run that resumes makes the
    same decisions as one that was not interrupted."""

    skipped: Count = 0
    """Updates that were not applied, among those that led here; Adam has counted that many steps less."""
    skipped_in_a_row: Count = 0
    spikes_in_a_row: Count = 0
    losses: tuple[float, ...] = ()
    """Losses of the last steps without a spike, oldest first."""
    lr_scale: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Factor of the schedule's learning rate, up to the step `lowered_until`."""
    lowered_until: Count = 0
    rollbacks: tuple[Rollback, ...] = ()
    """All rollbacks of the run, oldest first."""
    last_scheduled: Count = 0
    """Step of the newest scheduled checkpoint, to which a rollback returns. Checkpoints on a signal do not
    count: they differ from attempt to attempt."""

    @property
    def is_stable(self) -> bool:
        """True if the last step was neither skipped nor a spike."""
        return self.skipped_in_a_row == self.spikes_in_a_row == 0


@dataclass(frozen=True)
class TrainState:
    """Position of a run. Learning rate and data order are functions of it, and a step draws no random
    numbers."""

    step: int = 0
    """Optimizer steps done."""
    consumed_samples: int = 0
    """Training samples consumed; also the position of the next one in the data order."""
    segments: tuple[Segment, ...] = ()
    """The data plan; the last segment is the current one."""
    run_id: str = ""
    """Drawn when the run began."""
    began_from: Origin | None = None
    """None: the initial weights were drawn at random."""
    health: HealthState = field(default_factory=HealthState)
    """Skipped updates, spikes and rollbacks so far."""

    @property
    def updates(self) -> int:
        """Steps whose update was applied."""
        return self.step - self.health.skipped
