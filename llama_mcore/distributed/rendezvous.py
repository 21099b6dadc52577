"""Rendezvous of the processes of a job in a store of torch, even if the port that they were given is taken.

All know one address, one first port and the job's name. The host lets the system choose a free port for the
job's store and announces it at the first free one of a few candidate ports; the others ask there in turn, and
go on to the next where another program answers, another job, or nobody yet.

torch's own stores do not do that: the client of its TCPStore waits for ever where something listens that is
no store, and joins another job's unasked; its FileStore needs locks that network file systems may not have,
and leaves a file that the next attempt would join.
"""

import hashlib
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from datetime import timedelta

from torch.distributed import DistNetworkError, DistStoreError, TCPStore

from llama_mcore.distributed.launch_env import RankInfo
from llama_mcore.errors import PreflightError, Problem

LOOPBACK = "127.0.0.1"
CANDIDATES = 8
LIMIT_S = 300.0
"""Seconds for all processes of a job to join: nodes load Python from one file system at different speeds."""
_SERVERS_TRIED = 8
_LATE_S = 10.0
"""Seconds for the others where rank 0 came last: they ask for it every two seconds."""
_LONGEST_ANSWER = 1024
_ANSWER_S = 2.0
_SHORTEST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 2.0
_RESOLVING_S = 20.0


@contextmanager
def store_port(
    address: str, first_port: int, job: str, *, is_host: bool, limit_s: float = LIMIT_S
) -> Iterator[int]:
    """Port of the job's store, which the host serves, and announces to the others while the context lasts.

    A multi-tenant store that the host then makes at that port is this one. Raises PreflightError.
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
    """A store at a port of the system's choice that this process can open once more."""
    options = {"wait_for_workers": False, "multi_tenant": True}
    tried: list[TCPStore] = []  # kept, so that the next one gets another port
    while True:
        port, listener = 0, None
        if host := heard_at(address):
            own = socket.create_server((host, 0), backlog=1024)
            port, listener = own.getsockname()[1], own.detach()  # the store closes it
        tried.append(TCPStore("localhost", port, None, True, limit, master_listen_fd=listener, **options))
        # Seen once in a process that had made many: the second would not open, as if its port were in use.
        try:
            TCPStore("localhost", tried[-1].port, None, True, limit, **options)
        except DistNetworkError:
            if len(tried) == _SERVERS_TRIED:
                raise
        else:
            return tried[-1]


def job_store(place: RankInfo, limit_s: float = LIMIT_S) -> TCPStore:
    """The job's store, once all its processes have joined.

    Raises PreflightError if some do not within `limit_s`, or as `store_port` does.
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
            reason = f"not all joined within {limit_s:.0f} s ({error})"
            remedy = "look above for errors of the others, and check that they can reach rank 0"
            raise PreflightError(Problem("ranks", place.world_size, reason, remedy)) from None


def candidate_ports(first: int) -> range:
    return range(first, min(first + CANDIDATES, 1 << 16))


def heard_at(address: str) -> str:
    """Address to listen at for those who know this host by `address`; "" for all of its addresses."""
    # on the host itself its name may resolve to another address than elsewhere
    return LOOPBACK if address in (LOOPBACK, "localhost") else ""


@contextmanager
def announced(port: int, job: str, ports: Sequence[int], address: str = "") -> Iterator[int]:
    """Announcement at the first free one of `ports`, which is yielded, that the store of `job` is at `port`.

    `address`: by which the others know this host. Raises PreflightError if no port is free.
    """
    answer = f"{port} {_greeting(job)}\n".encode()
    with closing(_first_free(address, ports)) as listener:
        # ends with the process, or once the listener is shut down
        threading.Thread(target=_answer_all, args=(listener, answer), daemon=True).start()
        try:
            yield listener.getsockname()[1]
        finally:
            listener.shutdown(socket.SHUT_RDWR)


def find_store(address: str, job: str, ports: Sequence[int], limit_s: float = LIMIT_S) -> int:
    """Port of the store of `job`, whose host has `address`.

    Raises PreflightError if the address does not resolve, or the host has not answered within `limit_s`.
    """
    until, pause = time.monotonic() + limit_s, _SHORTEST_PAUSE_S
    resolve(address, min(limit_s, _RESOLVING_S))
    while True:
        for port in ports:
            answer = _ask(address, port, max(0.1, min(_ANSWER_S, until - time.monotonic())))
            found, _, greeting = answer.partition(" ")
            if greeting == f"{_greeting(job)}\n" and found.isdecimal():
                return int(found)
        if time.monotonic() + pause > until:
            raise PreflightError(
                Problem(
                    "MASTER_ADDR",
                    f"{address} (ports {ports[0]} to {ports[-1]})",
                    f"rank 0 of this job did not answer there within {limit_s:.0f} s",
                    "check that it runs and that no firewall blocks these ports; or set MASTER_ADDR and "
                    "MASTER_PORT to an address and a port that are reachable",
                )
            )
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE_S)


def _greeting(job: str) -> str:
    """Greeting by which processes of a job know each other, whatever characters its name has."""
    return f"llama-mcore {hashlib.sha256(job.encode(errors='surrogateescape')).hexdigest()}"


def _first_free(address: str, ports: Sequence[int]) -> socket.socket:
    for port in ports:
        try:
            return socket.create_server((heard_at(address), port), backlog=1024)
        except OSError:
            continue
    raise PreflightError(
        Problem(
            "MASTER_PORT",
            f"{ports[0]} to {ports[-1]}",
            "are all in use on this node, or may not be opened",
            "set MASTER_PORT to a free port, 1024 or higher",
        )
    )


def _answer_all(listener: socket.socket, answer: bytes) -> None:
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        with closing(connection):
            try:
                connection.settimeout(_ANSWER_S)
                connection.sendall(answer)
            except OSError:
                continue  # the client has gone, and will ask again


def _ask(address: str, port: int, limit_s: float) -> str:
    """First line that is sent at a port; empty where none is."""
    until, line = time.monotonic() + limit_s, b""
    try:
        with socket.create_connection((address, port), timeout=limit_s) as connection:
            while not line.endswith(b"\n") and len(line) < _LONGEST_ANSWER:
                connection.settimeout(max(0.01, until - time.monotonic()))
                part = connection.recv(_LONGEST_ANSWER)
                if not part:
                    break
                line += part
    except OSError:
        return ""
    return line.decode(errors="replace")


def resolve(address: str, limit_s: float = _RESOLVING_S) -> None:
    """Resolve an address. Raises PreflightError if that fails, or no name server answers within `limit_s`."""
    until = time.monotonic() + limit_s
    while True:
        try:
            socket.getaddrinfo(address, None)
            return
        except (OSError, UnicodeError) as error:
            is_temporary = isinstance(error, socket.gaierror) and error.errno == socket.EAI_AGAIN
            if not is_temporary or time.monotonic() > until:
                remedy = "set MASTER_ADDR to a name or address by which all nodes reach the first one"
                raise PreflightError(
                    Problem("MASTER_ADDR", address, f"does not resolve ({error})", remedy)
                ) from None
        time.sleep(_LONGEST_PAUSE_S)
