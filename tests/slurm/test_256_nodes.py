"""The unmodified 65b.sh on 256 virtual nodes of a real Slurm: every one of 2,048 ranks gets its place.

In place of the launcher each node writes down what it was given, and torchrun's own code says which ranks
that makes. 256 launchers of eight ranks do not fit two cores: tests/launch/test_torchrun.py starts two for
real.
"""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
from torch.distributed import run as torch_run
from torch.distributed.launcher.api import LaunchConfig

from llama_mcore.launch import torchrun
from tests.slurm.cluster import Job, cluster
from tests.support.world import ROOT

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.process,
    pytest.mark.skipif(shutil.which("sbatch") is None, reason="needs Slurm"),
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to start Slurm"),
]
NODES, GPUS = 256, 8
BIN = Path(__file__).with_name("bin")


@dataclass(frozen=True)
class Node:
    environment: dict[str, str]
    arguments: list[str]

    def launch(self, monkeypatch: pytest.MonkeyPatch) -> tuple[LaunchConfig, list[str]]:
        """torchrun's settings and the command of every rank."""
        monkeypatch.delenv("PET_NODE_RANK", raising=False)
        monkeypatch.setenv("SLURM_NODEID", self.environment["SLURM_NODEID"])
        config, _, command = torch_run.config_from_args(torchrun.parsed(self.arguments[1:]))
        return config, command


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Node]:
    folder = tmp_path_factory.mktemp("nodes")
    places = folder / "places"
    places.mkdir()
    with cluster(folder / "slurm", NODES) as slurm:
        slurm |= {"PATH": f"{BIN}:{slurm['PATH']}", "PLACES": str(places)}
        job = Job(slurm, folder, "slurm/65b.sh", cwd=ROOT)
        assert job.ended() == "0:0", job.said()
    return {int(path.name): _read(path) for path in places.iterdir()}


def _read(path: Path) -> Node:
    environment, _, arguments = path.read_bytes().decode().partition("\0\0")
    pairs = (line.partition("=") for line in environment.split("\0"))
    return Node({name: value for name, _, value in pairs}, arguments.split("\0")[:-1])


def test_every_node_is_there_once(nodes: dict[int, Node]) -> None:
    assert sorted(nodes) == list(range(NODES))
    assert len({node.environment["SLURMD_NODENAME"] for node in nodes.values()}) == NODES


def test_every_rank_is_there_once(nodes: dict[int, Node], monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's agent gives a node's processes the ranks from its own rank times their number on."""
    ranks = []
    for number, node in nodes.items():
        config, _ = node.launch(monkeypatch)
        assert config.min_nodes == config.max_nodes == NODES
        assert config.rdzv_configs["rank"] == number
        ranks += range(number * config.nproc_per_node, (number + 1) * config.nproc_per_node)
    assert sorted(ranks) == list(range(NODES * GPUS))


def test_every_rank_has_its_device(nodes: dict[int, Node], monkeypatch: pytest.MonkeyPatch) -> None:
    for node in nodes.values():
        assert node.launch(monkeypatch)[0].nproc_per_node == GPUS
        assert node.environment["CUDA_VISIBLE_DEVICES"] == ",".join(map(str, range(GPUS)))


def test_all_meet_at_the_first_node(nodes: dict[int, Node], monkeypatch: pytest.MonkeyPatch) -> None:
    configs = [node.launch(monkeypatch)[0] for node in nodes.values()]
    assert {config.rdzv_backend for config in configs} == {"static"}
    assert len({(config.rdzv_endpoint, config.run_id) for config in configs}) == 1
    address, _, port = configs[0].rdzv_endpoint.rpartition(":")
    assert address == os.uname().nodename  # of all virtual nodes
    assert 0 < int(port) < 1 << 15


def test_all_are_told_the_same(nodes: dict[int, Node], monkeypatch: pytest.MonkeyPatch) -> None:
    commands = {tuple(node.launch(monkeypatch)[1][-3:]) for node in nodes.values()}
    assert commands == {("tools/train.py", "--config", "65b")}
