"""What a run reports while it trains. Imports no torch."""

from pydantic import Field

from llama_mcore.config.section import Section


class ObserveConfig(Section):
    log_interval: int = Field(default=10, ge=1)
    """Steps between lines on a plain (non-terminal) output; metrics.jsonl has every step."""
    tensorboard: bool = True
    """Write TensorBoard events to RUN_DIR/tensorboard."""
    straggler_window: int = Field(default=50, ge=0)
    """Steps after which ranks slower than the others are looked for; 0: never."""
