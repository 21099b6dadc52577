"""How fast ranks add up a buffer, and whether they add it up right."""

import torch
import torch.distributed as dist

from llama_mcore.distributed.device import seconds_of

BYTES = 16_000_000
REPEATS = 3


def all_reduce_speed(device: torch.device, group: dist.ProcessGroup | None = None) -> float:
    """Bytes per second of an all_reduce of 16 MB over `group`, or the world: the buffer's size by the time of
    the fastest. All ranks of the group call it. Raises ArithmeticError for a wrong sum."""
    tensor = torch.ones(BYTES // 4, device=device)
    ranks = dist.get_world_size(group)
    fastest = float("inf")
    for _ in range(1 + REPEATS):
        tensor.fill_(1)
        fastest = min(fastest, seconds_of(lambda: dist.all_reduce(tensor, group=group)))
        if not bool((tensor == ranks).all()):
            raise ArithmeticError("all_reduce gave a wrong sum")
    return BYTES / fastest
