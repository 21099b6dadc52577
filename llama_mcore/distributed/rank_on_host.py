"""Which rank this process is, known before it joins the others, and where: as messages name it."""

import os
import socket
from dataclasses import dataclass

from llama_mcore.distributed.launch_env import rank_info


@dataclass(frozen=True)
class RankOnHost:
    rank: int
    world_size: int
    host: str

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host}"


def this_rank() -> RankOnHost:
    place = rank_info(os.environ)
    return RankOnHost(place.rank, place.world_size, socket.gethostname())
