"""What a run must remember to go on exactly where it stopped, besides weights and optimizer states."""

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
    """Of the run that wrote it."""
    step: Count
    manifest_sha256: str
    """Of the file manifest.json, which names the hashes of all others."""


class Rollback(Section):
    """A return to a checkpoint, and the samples that were read since then and given up."""

    at_step: Count
    """The last step that was given up."""
    to_step: Count
    """The step of the checkpoint."""
    first_sample: Count
    end_sample: Count
    """The samples [first_sample, end_sample) count as read, and are not read again."""
    reason: str


class HealthState(Section):
    """What train/health.py remembers of the steps so far. A function of the run's steps, so that a run that
    resumes decides as it would have."""

    skipped: Count = 0
    """Updates that were not applied, of those that led here: Adam has counted so many steps less."""
    skipped_in_a_row: Count = 0
    spikes_in_a_row: Count = 0
    losses: tuple[float, ...] = ()
    """Of the last steps without a spike, oldest first."""
    lr_scale: Annotated[float, Field(gt=0, le=1)] = 1.0
    """What the schedule's learning rate is multiplied with, up to the step `lowered_until`."""
    lowered_until: Count = 0
    rollbacks: tuple[Rollback, ...] = ()
    """All of the run, oldest first."""
    anchor: Count = 0
    """Step of the newest checkpoint that was written because it was due: where a rollback returns to. What is
    written because of a signal differs from attempt to attempt, so that it decides nothing."""

    @property
    def is_stable(self) -> bool:
        """Nothing speaks against the weights of now."""
        return self.skipped_in_a_row == self.spikes_in_a_row == 0


@dataclass(frozen=True)
class TrainState:
    """Learning rate and data order are functions of these; no generator is drawn from in a step."""

    step: int = 0
    """Optimizer steps done."""
    consumed_samples: int = 0
    """Training sequences consumed: the next one's position in the data order."""
    segments: tuple[Segment, ...] = ()
    """What the run has read and goes on reading; the last one is at work."""
    run_id: str = ""
    """Drawn when the run began."""
    began_from: Origin | None = None
    """None: from weights that were drawn."""
    health: HealthState = field(default_factory=HealthState)
    """What was noticed of the steps so far."""

    @property
    def updates(self) -> int:
        """Steps whose update was applied."""
        return self.step - self.health.skipped
