"""What a run must remember to go on exactly where it stopped, besides weights and optimizer states."""

from dataclasses import dataclass


@dataclass(frozen=True)
class TrainState:
    """Learning rate and data order are functions of these two; no generator is drawn from in a step."""

    step: int = 0
    """Optimizer steps done."""
    consumed_samples: int = 0
    """Training sequences consumed: the next one's position in the data order."""
