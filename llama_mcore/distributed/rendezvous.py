"""Where the processes of a job meet when the port that they were told is taken.

All know one address, one first port and the job's name. The host lets the system choose a free port for
the job's store and says which at the first free one of a few candidate ports; the others ask there in turn,
and go on where somebody else answers: another program, another job, or nobody yet. (torch's own client waits
for ever where something listens that is no store, and joins another job's without a question.)
"""

import hashlib
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager

from llama_mcore.errors import PreflightError, Problem

LOOPBACK = "127.0.0.1"
CANDIDATES = 8
LIMIT_S = 300.0
"""How long a job's processes may take to come: nodes load Python from one file system at different speeds."""
_LONGEST_ANSWER = 1024
_ANSWER_S = 2.0
_SHORTEST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 2.0
_RESOLVING_S = 20.0


def candidate_ports(first: int) -> range:
    return range(first, min(first + CANDIDATES, 1 << 16))


def heard_at(address: str) -> str:
    """Where to listen for those who know this host by `address`: there if that is the machine itself; else
    everywhere, as on the host its name may stand for another address than elsewhere."""
    return LOOPBACK if address in (LOOPBACK, "localhost") else ""


@contextmanager
def announced(port: int, job: str, ports: Sequence[int], address: str = "") -> Iterator[int]:
    """Say at the first free one of `ports`, which is yielded, that the store of `job` is at `port`, to those
    who know this host by `address`.

    Raises PreflightError if none is free.
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
                    f"rank 0 of this job has not answered there within {limit_s:.0f} s",
                    "see whether it runs and whether a firewall lets these ports through; or set MASTER_ADDR "
                    "and MASTER_PORT to an address and a port that are reachable",
                )
            )
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE_S)


def _greeting(job: str) -> str:
    """Of a job, whatever its name holds."""
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
            "are all taken on this node, or may not be opened",
            "set MASTER_PORT to a free one from 1024 on",
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
                continue  # it is gone, and asks again


def _ask(address: str, port: int, limit_s: float) -> str:
    """What is said there, up to the end of the first line; empty if nobody does."""
    until, said = time.monotonic() + limit_s, b""
    try:
        with socket.create_connection((address, port), timeout=limit_s) as connection:
            while not said.endswith(b"\n") and len(said) < _LONGEST_ANSWER:
                connection.settimeout(max(0.01, until - time.monotonic()))
                part = connection.recv(_LONGEST_ANSWER)
                if not part:
                    break
                said += part
    except OSError:
        return ""
    return said.decode(errors="replace")


def resolve(address: str, limit_s: float = _RESOLVING_S) -> None:
    """Raises PreflightError if no name server knows the address, or none answers within `limit_s`."""
    until = time.monotonic() + limit_s
    while True:
        try:
            socket.getaddrinfo(address, None)
            return
        except (OSError, UnicodeError) as error:
            passing = isinstance(error, socket.gaierror) and error.errno == socket.EAI_AGAIN
            if not passing or time.monotonic() > until:
                remedy = "set MASTER_ADDR to a name or an address of the first node that the others know"
                raise PreflightError(
                    Problem("MASTER_ADDR", address, f"does not resolve ({error})", remedy)
                ) from None
        time.sleep(_LONGEST_PAUSE_S)
