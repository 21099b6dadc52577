"""What a run must remember to go on exactly where it stopped, besides weights and optimizer states."""

from dataclasses import dataclass

from llama_mcore.data.ledger import Segment


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
