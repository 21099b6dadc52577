"""When checkpoints are written and how many stay. Pure Python."""

from pydantic import Field

from llama_mcore.section import Section


class CheckpointConfig(Section):
    interval: int = Field(default=1000, ge=1)
    """Steps between checkpoints; one is also written at the end and when a run is asked to stop."""
    keep: int = Field(default=2, ge=1)
    """The newest so many stay."""
    asynchronous: bool = True
    """Training goes on while a checkpoint is written; it waits only for the copy to host memory."""
    timeout_s: float = Field(default=1800.0, gt=0, le=1e9)
    """A checkpoint that is not written after so many seconds has failed, and the run ends. Collectives wait
    longer than that, and hold no such time beyond thirty years."""
    also_deepspeed: bool = False
    """Also write DeepSpeed's own checkpoint to RUN_DIR/deepspeed, for its tools. Training waits for that."""
