"""When checkpoints are written, how many stay, and what memory that takes. Imports no torch."""

from typing import Annotated

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from llama_mcore.config.section import Section
from llama_mcore.errors import ConfigError
from llama_mcore.units import parse_bytes

RING_BYTES = 256 << 20
"""Of the ring through which a rank copies that may not hold all of its state."""
_LEAST = 64 << 10


def _size(value: object) -> int | None:
    if value is None:
        return None
    try:
        size = parse_bytes("", str(value))
    except ConfigError:
        size = 0
    if size < _LEAST:
        raise PydanticCustomError("size", "must be a size like 500MB, 8GB or 2GiB, from 64KiB")
    return size


class CheckpointConfig(Section):
    interval: int = Field(default=1000, ge=1)
    """Steps between checkpoints; one is also written at the end and when a run is asked to stop."""
    keep: int = Field(default=2, ge=1)
    """The newest so many stay."""
    asynchronous: bool = True
    """Training goes on while a checkpoint is copied to host memory and written; its next update waits for the
    copy."""
    host_memory: Annotated[int | None, BeforeValidator(_size)] = None
    """Most host memory, as 8GB, that each rank takes for the copy: 12 bytes a parameter that it owns. Where
    that is too little ranks copy through a ring of 256 MiB each, and training waits until all is written.
    null: half of what a node has available when the run starts, divided among its ranks."""
    timeout_s: float = Field(default=1800.0, gt=0, le=1e9)
    """A checkpoint that is not written after so many seconds has failed, and the run ends. Collectives wait
    longer than that, and hold no such time beyond thirty years."""
    also_deepspeed: bool = False
    """Also write DeepSpeed's own checkpoint to RUN_DIR/deepspeed, for its tools. Training waits for that."""

    def copy_limit(self, available: int) -> int:
        """Bytes that a rank may take whose part of its node's memory is `available`."""
        return available // 2 if self.host_memory is None else self.host_memory

    @property
    def ring_bytes(self) -> int:
        return min(RING_BYTES, self.host_memory or RING_BYTES)
