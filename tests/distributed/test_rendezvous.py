"""llama_mcore.distributed.rendezvous and store: real sockets, real stores, ports that others have taken."""

import ipaddress
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace

import psutil
import pytest
from torch.distributed import TCPStore

from llama_mcore.distributed.launch_env import RankInfo
from llama_mcore.distributed.rendezvous import (
    announced,
    candidate_ports,
    find_store,
    heard_at,
    job_store,
    resolve,
    store_port,
)
from llama_mcore.errors import PreflightError
from tests.support.errors import refused
from tests.support.world import reserved_port

# starts no process, and waits for as long as many that do
pytestmark = [pytest.mark.process, pytest.mark.wait]

HERE = "127.0.0.1"
LIMIT_S = 120.0


@contextmanager
def taken(answer: bytes = b"") -> Iterator[int]:
    """A port where a program listens that says `answer` to everybody, or nothing."""
    with closing(socket.create_server(("", 0))) as listener:

        def serve() -> None:
            open_ones = []
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                connection.sendall(answer)
                open_ones.append(connection)

        threading.Thread(target=serve, daemon=True).start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)


def test_the_first_free_port_is_taken_and_found() -> None:
    with taken() as first, reserved_port() as second:
        ports = [first, second]
        with announced(4711, "job", ports) as at:
            assert at == second
            assert find_store(HERE, "job", ports, LIMIT_S) == 4711


@pytest.mark.parametrize(
    "answer", [b"SSH-2.0\r\n", b"x" * 5000, b"\xff\xfe\n", b"1 llama-mcore 0\n", b"4711", b" llama-mcore\n"]
)
def test_another_program_that_talks_is_passed_by(answer: bytes) -> None:
    with taken(answer) as first, reserved_port() as second:
        ports = [first, second]
        with announced(4711, "job", ports):
            assert find_store(HERE, "job", ports, LIMIT_S) == 4711


def test_another_job_is_passed_by() -> None:
    with reserved_port() as first, reserved_port() as second:
        ports = [first, second]
        with announced(1, "123.0", ports), announced(2, "123.1", ports) as at:
            assert at == second
            assert find_store(HERE, "123.1", ports, LIMIT_S) == 2
            assert find_store(HERE, "123.0", ports, LIMIT_S) == 1


def test_who_comes_first_waits_for_the_host() -> None:
    found = []
    with reserved_port() as port:
        early = threading.Thread(target=lambda: found.append(find_store(HERE, "job", [port], LIMIT_S)))
        early.start()
        time.sleep(0.3)
        with announced(4711, "job", [port]):
            early.join(LIMIT_S)
    assert found == [4711]


def test_a_port_is_free_again_after_the_meeting() -> None:
    with reserved_port() as port:
        for store in (1, 2):
            with announced(store, "job", [port]):
                assert find_store(HERE, "job", [port], LIMIT_S) == store
        with refused(PreflightError, "MASTER_ADDR"):
            find_store(HERE, "job", [port], limit_s=0.2)


def test_ports_that_are_all_taken_are_named() -> None:
    with (
        taken() as first,
        refused(PreflightError, "MASTER_PORT", f"{first} to {first}"),
        announced(1, "job", [first]),
    ):
        pass


@pytest.mark.parametrize("answer", [b"", b"x" * 20])
def test_nobody_waits_for_ever(answer: bytes) -> None:
    """A listener that never ends its line is given up on too."""
    with (
        taken(answer) as port,
        refused(PreflightError, "MASTER_ADDR", f"{HERE} (ports {port} to {port})") as caught,
    ):
        find_store(HERE, "job", [port], limit_s=1)
    assert "within 1 s" in caught.value.problems[0].reason


@pytest.mark.parametrize("address", ["no such host", "a" * 300, "\udcff", "a..b"])
def test_an_address_that_does_not_resolve_is_said(address: str) -> None:
    with refused(PreflightError, "MASTER_ADDR", address):
        resolve(address, limit_s=0.1)


def test_candidates_are_ports() -> None:
    assert list(candidate_ports(20_000)) == list(range(20_000, 20_008))
    assert list(candidate_ports(65_534)) == [65_534, 65_535]


def meet(place: RankInfo) -> list[bytes]:
    """Values that each rank reads of its neighbour's."""
    read, stores = [b""] * place.world_size, []

    def rank_main(rank: int) -> None:
        store = job_store(replace(place, rank=rank), LIMIT_S)
        stores.append(store)  # that of the host serves the others to the end
        store.set(str(rank), f"of {place.job} {rank}")
        read[rank] = store.get(str((rank + 1) % place.world_size))

    ranks = [threading.Thread(target=rank_main, args=(rank,)) for rank in range(place.world_size)]
    for thread in ranks:
        thread.start()
    for thread in ranks:
        thread.join(2 * LIMIT_S)
    return read


def test_ranks_meet_though_a_program_or_a_store_has_their_port() -> None:
    place = RankInfo(world_size=3, master_address=HERE, job="a")
    wanted = [b"of a 1", b"of a 2", b"of a 0"]
    with taken() as port:
        assert meet(replace(place, master_port=port)) == wanted
    foreign = TCPStore(HERE, 0, None, True, wait_for_workers=False)
    assert meet(replace(place, master_port=foreign.port)) == wanted
    assert foreign.num_keys() == 0


def test_ranks_that_do_not_come_are_said() -> None:
    with reserved_port() as port, refused(PreflightError, "ranks", 2) as caught:
        job_store(RankInfo(world_size=2, master_address=HERE, master_port=port, job="a"), limit_s=1)
    assert "within 1 s" in caught.value.problems[0].reason


def test_a_host_whose_address_means_nothing_does_not_wait() -> None:
    with (
        refused(PreflightError, "MASTER_ADDR", "no such host"),
        store_port("no such host", 20_000, "a", is_host=True),
    ):
        pass


@pytest.mark.parametrize("address", ["127.0.0.1", "localhost"])
def test_a_job_of_one_machine_is_not_heard_by_others(address: str) -> None:
    with closing(socket.create_server((address, 0))) as taken:
        port = taken.getsockname()[1] + 1
    with store_port(address, port, "job", is_host=True):
        assert all(ipaddress.ip_address(found).is_loopback for found in listening())


def test_by_any_other_name_all_addresses_answer() -> None:
    """A host's own name is 127.0.1.1 on many a host, and another address elsewhere."""
    assert [heard_at(name) for name in (socket.gethostname(), "10.0.0.1", "127.0.1.1")] == [""] * 3


def listening() -> list[str]:
    found = [one.laddr.ip for one in psutil.Process().net_connections("tcp") if one.status == "LISTEN"]
    assert found
    return found
