"""Settings of the reports of a run. Imports no torch."""

from pydantic import Field

from llama_mcore.config.section import Section


class ObserveConfig(Section):
    """Reports of a run while it trains."""

    log_interval: int = Field(default=10, ge=1)
    """Steps between lines on an output that is no terminal; metrics.jsonl has every step."""
    tensorboard: bool = True
    """Write TensorBoard events to RUN_DIR/tensorboard."""
    straggler_window: int = Field(default=50, ge=0)
    """Steps between checks for ranks slower than the others; 0: never."""
