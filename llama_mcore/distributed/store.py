"""The store through which a job's processes find each other, also if the port that they know is taken."""

import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from torch.distributed import DistNetworkError, DistStoreError, TCPStore

from llama_mcore.distributed.launch_env import RankInfo
from llama_mcore.distributed.rendezvous import (
    LIMIT_S,
    announced,
    candidate_ports,
    find_store,
    heard_at,
    resolve,
)
from llama_mcore.errors import PreflightError, Problem

_SERVERS_TRIED = 8
_LATE_S = 10.0
"""For the others, where rank 0 came last: they ask for it every two seconds."""


@contextmanager
def store_port(
    address: str, first_port: int, job: str, *, is_host: bool, limit_s: float = LIMIT_S
) -> Iterator[int]:
    """The port of the job's store, which the host serves, and tells the others while the context lasts.

    A store that the host then makes at that port, multi-tenant, is this one. Raises PreflightError.
    """
    ports = candidate_ports(first_port)
    if not is_host:
        yield find_store(address, job, ports, limit_s)
        return
    resolve(address)
    server = _server(address, timedelta(seconds=limit_s))
    with announced(server.port, job, ports, address):
        yield server.port


def _server(address: str, limit: timedelta) -> TCPStore:
    """A store at a port of the system's choice that this process can open once more.

    Seen once in a process that had made many before: it could not, and said that the port was in use.
    """
    options = {"wait_for_workers": False, "multi_tenant": True}
    tried: list[TCPStore] = []  # kept, so that the next one gets another port
    while True:
        port, listener = 0, None
        if host := heard_at(address):
            own = socket.create_server((host, 0), backlog=1024)
            port, listener = own.getsockname()[1], own.detach()  # the store closes it
        tried.append(TCPStore("localhost", port, None, True, limit, master_listen_fd=listener, **options))
        try:
            TCPStore("localhost", tried[-1].port, None, True, limit, **options)
        except DistNetworkError:
            if len(tried) == _SERVERS_TRIED:
                raise
        else:
            return tried[-1]


def job_store(place: RankInfo, limit_s: float = LIMIT_S) -> TCPStore:
    """Wait until all processes of the job are there, and return their store.

    Raises PreflightError if some do not come within `limit_s`, or as `store_port` does.
    """
    is_host = place.rank == 0
    address = "localhost" if is_host else place.master_address
    until = time.monotonic() + limit_s
    with store_port(
        place.master_address, place.master_port, place.job, is_host=is_host, limit_s=limit_s
    ) as port:
        limit = timedelta(seconds=max(_LATE_S, until - time.monotonic()))
        try:
            return TCPStore(address, port, place.world_size, is_host, limit, multi_tenant=is_host)
        except DistStoreError as error:
            reason = f"not all came within {limit_s:.0f} s ({error})"
            remedy = "see in the output above what became of the others, or why they cannot reach this one"
            raise PreflightError(Problem("ranks", place.world_size, reason, remedy)) from None
