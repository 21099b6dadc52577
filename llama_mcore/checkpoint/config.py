"""Section `checkpoint` of a configuration: when to save, how many to keep, how much memory to use. Imports no
torch."""

from typing import Annotated

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from llama_mcore.config.section import Section
from llama_mcore.errors import ConfigError
from llama_mcore.units import parse_bytes

RING_BYTES = 256 << 20
"""Size of the ring of a rank that may not hold a whole save."""
_LEAST = 64 << 10


def _size(value: object) -> int | None:
    if value is None:
        return None
    try:
        size = parse_bytes("", str(value))
    except ConfigError:
        size = 0
    if size < _LEAST:
        raise PydanticCustomError("size", "must be a size such as 500MB, 8GB or 2GiB, at least 64KiB")
    return size


class CheckpointConfig(Section):
    interval: int = Field(default=1000, ge=1)
    """Steps between checkpoints; one is also written at the end and when a run is asked to stop."""
    keep: int = Field(default=2, ge=1)
    """Number of newest checkpoints that are kept."""
    asynchronous: bool = True
    """Training goes on while a checkpoint is copied to host memory and written; only the next update waits,
    for the copy."""
    host_memory: Annotated[int | None, BeforeValidator(_size)] = None
    """Most host memory, such as 8GB, that each rank may use for the copy, which takes 12 bytes per parameter
    that it owns. Where that is too little, ranks copy through a ring of 256 MiB each, and training waits
    until all is written. null: half of what is available on a node when the run starts, divided among its
    ranks."""
    timeout_s: float = Field(default=1800.0, gt=0, le=1e9)
    """Seconds after which a checkpoint that is not written has failed, and the run ends. Collectives wait
    longer than that, and cannot wait for more than thirty years."""
    also_deepspeed: bool = False
    """Also write DeepSpeed's own checkpoint to RUN_DIR/deepspeed, for its tools. Training waits for it."""

    def copy_limit(self, available: int) -> int:
        """Bytes that a rank may use, with `available` bytes as its part of the node's memory."""
        return available // 2 if self.host_memory is None else self.host_memory

    @property
    def ring_bytes(self) -> int:
        return min(RING_BYTES, self.host_memory or RING_BYTES)
