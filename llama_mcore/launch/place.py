"""Which rank this process is, known before it joins the others."""

import os
import socket
from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    rank: int
    world_size: int
    host: str

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host}"


def place_from_env() -> Place:
    """As the launcher says it; alone if there is none."""
    rank, world_size = (int(os.environ.get(name) or default) for name, default in _VARIABLES.items())
    return Place(rank, world_size, socket.gethostname())


_VARIABLES = {"RANK": "0", "WORLD_SIZE": "1"}
