"""Check that every rank has a working GPU of its own, or that all use CPUs, before anything is built.

NCCL notices two ranks on one GPU in its first collective, and reports it in a traceback of each. Here ranks
exchange their devices through the job's store, which needs no device.
"""

import json
import socket
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import count

import torch
from torch.distributed import DistError, PrefixStore, Store

from llama_mcore.distributed.device import device_identity, local_device, select_device, usable_gpus
from llama_mcore.errors import PreflightError, Problem

_NAMED_RANKS = 8
_LEAVE_S, _LEAVE_POLL_S = 10.0, 0.02
_rounds = count()
"""A process may join several jobs through one store, one after another."""


@dataclass(frozen=True)
class RankDevice:
    """Device of a rank."""

    rank: int
    host: str
    gpu: str
    """UUID of the GPU; "" for a CPU."""
    gpus: int
    """Number of GPUs that the rank sees."""
    problem: Problem | None = None


def take_device(store: Store, rank: int, world_size: int) -> torch.device:
    """Make this rank's device the current one and return it.

    Raises PreflightError on every rank with the problems of all.
    Collective: all ranks call it.
    """
    prefix = PrefixStore(f"llama_mcore/devices/{next(_rounds)}", store)
    device, mine = _taken(rank)
    prefix.append("ranks", f"{json.dumps(asdict(mine))}\n")  # type: ignore[attr-defined]
    if prefix.add("count", 1) == world_size:  # the last one checks, for all
        everyone = [_read(line) for line in prefix.get("ranks").decode().splitlines()]
        prefix.set("problems", json.dumps([asdict(problem) for problem in device_problems(everyone)]))
    try:
        problems = [Problem(**fields) for fields in json.loads(prefix.get("problems"))]
    except DistError:  # a rank did not come, or the store's left
        remedy = "look above for errors of the others"
        raise PreflightError(Problem("ranks", world_size, "not all reported their device", remedy)) from None
    if problems:
        _leave(prefix, rank, world_size)
        raise PreflightError(problems)
    return device


def _leave(prefix: Store, rank: int, world_size: int) -> None:
    """Let rank 0, which may serve the store, leave last: others may still be reading from it."""
    until, left = time.monotonic() + _LEAVE_S, prefix.add("left", 1)
    while rank == 0 and left < world_size and time.monotonic() < until:
        time.sleep(_LEAVE_POLL_S)
        left = prefix.add("left", 0)


def _taken(rank: int) -> tuple[torch.device, RankDevice]:
    host, gpus = socket.gethostname(), usable_gpus()
    try:
        device, gpu = local_device(), device_identity()
    except PreflightError as error:
        return torch.device("meta"), RankDevice(rank, host, f"none of {gpus}", gpus, error.problems[0])
    try:
        return select_device(), RankDevice(rank, host, gpu, gpus)
    except PreflightError as error:
        return device, RankDevice(rank, host, gpu, gpus, error.problems[0])


def _read(line: str) -> RankDevice:
    fields = json.loads(line)
    problem = fields.pop("problem")
    return RankDevice(**fields, problem=Problem(**problem) if problem else None)


def device_problems(ranks: Sequence[RankDevice]) -> list[Problem]:
    """Problems that keep these ranks from computing together, in the order in which to fix them."""
    return [*_mixed(ranks), *_shared(ranks), *_failed(ranks)]


def _mixed(ranks: Sequence[RankDevice]) -> list[Problem]:
    without = [one for one in ranks if not one.gpu]
    if len(without) in (0, len(ranks)):
        return []
    remedy = "run llama-mcore doctor on that host, or set run.device=cpu for all"
    return [Problem("ranks without a GPU", _named(without), "all others have a GPU", remedy)]


def _shared(ranks: Sequence[RankDevice]) -> list[Problem]:
    """Problems of ranks that share a GPU, one for each host."""
    of_gpu: dict[tuple[str, str], list[RankDevice]] = defaultdict(list)
    for one in ranks:
        if one.gpu:
            of_gpu[one.host, one.gpu].append(one)
    of_host: dict[str, list[RankDevice]] = defaultdict(list)
    for (host, _), sharing in of_gpu.items():
        if len(sharing) > 1:
            of_host[host] += sharing
    return [
        Problem("ranks on one GPU", _named(sharing), _one_each(sharing[0].gpus), _fewer(sharing[0].gpus))
        for sharing in of_host.values()
    ]


def _one_each(gpus: int) -> str:
    return f"each needs a GPU of its own, and this host shows {gpus}"


def _fewer(gpus: int) -> str:
    return (
        f"start {gpus} there (--nproc-per-node {gpus}, with a parallel.tp that divides the ranks), "
        "or set run.device=cpu"
    )


def _failed(ranks: Sequence[RankDevice]) -> list[Problem]:
    """Problems of single ranks, one for all ranks that have the same."""
    of_problem: dict[Problem, list[RankDevice]] = defaultdict(list)
    for one in ranks:
        if one.problem:
            of_problem[one.problem].append(one)
    return [
        Problem(problem.field, f"{problem.value} (rank {_named(failed)})", problem.reason, problem.remedy)
        for problem, failed in of_problem.items()
    ]


def _named(ranks: Sequence[RankDevice]) -> str:
    """Ranks and their hosts, e.g. "0, 1 on n1"; of many the first."""
    of_host: dict[str, list[int]] = defaultdict(list)
    for one in sorted(ranks, key=lambda one: one.rank)[:_NAMED_RANKS]:
        of_host[one.host].append(one.rank)
    text = "; ".join(f"{', '.join(map(str, numbers))} on {host}" for host, numbers in of_host.items())
    more = len(ranks) - _NAMED_RANKS
    return f"{text} and {more} more" if more > 0 else text
