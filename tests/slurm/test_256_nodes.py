"""The unmodified 65b.sh on 256 virtual nodes of a real Slurm: every one of 2,048 ranks gets its place.

In place of training each rank writes down what it was given.
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import SECONDS, Job, cluster
from tests.train.product import ROOT

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(
        "TEST_256_NODES" not in os.environ,
        reason="256 nodes do not meet within minutes on two cores; TEST_256_NODES=1 tries",
    ),
    pytest.mark.skipif(shutil.which("sbatch") is None, reason="needs Slurm"),
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to start Slurm"),
]
NODES, GPUS = 256, 8
NAMES = ("WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "SLURMD_NODENAME", "CUDA_VISIBLE_DEVICES")
PLACE = f"""
import os, sys
names = {(*NAMES, "MASTER_ADDR", "MASTER_PORT")!r}
line = "\\t".join([*(os.environ.get(name, "") for name in names), *sys.argv[1:]])
open(os.path.join("ranks", os.environ["RANK"]), "w").write(line)
"""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, list[str]]]:
    """Rank -> what it was given, in the order of NAMES, then address, port and arguments."""
    folder = tmp_path_factory.mktemp("nodes")
    checkout = folder / "checkout"
    shutil.copytree(ROOT / "slurm", checkout / "slurm")
    for name in ("tools", "ranks"):
        (checkout / name).mkdir()
    (checkout / "tools" / "train.py").write_text(PLACE)
    launcher = folder / "launcher"
    serving = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("warm_launcher.py")), str(launcher)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    try:
        while not launcher.exists():
            assert serving.poll() is None
            time.sleep(0.1)
        with cluster(folder / "slurm", NODES) as slurm:
            commands = f"{Path(__file__).with_name('bin')}:{slurm['PATH']}"
            slurm |= {"PATH": commands, "WARM_LAUNCHER": str(launcher)}
            job = Job(slurm, folder, "slurm/65b.sh", cwd=checkout)
            assert job.ended() == "0:0", job.said()
            places = {int(path.name): path.read_text().split("\t") for path in (checkout / "ranks").iterdir()}
            yield places
    finally:
        serving.kill()
        serving.wait(SECONDS)


def test_every_rank_is_there_once(ranks: dict[int, list[str]]) -> None:
    assert sorted(ranks) == list(range(NODES * GPUS))


def test_ranks_of_a_tensor_parallel_group_share_a_node(ranks: dict[int, list[str]]) -> None:
    for rank, (world_size, local_rank, local_world_size, node, devices, *_) in ranks.items():
        assert (int(world_size), int(local_world_size)) == (NODES * GPUS, GPUS)
        assert int(local_rank) == rank % GPUS
        assert node == ranks[rank - rank % GPUS][3]
        assert devices == ",".join(map(str, range(GPUS)))
    assert len({place[3] for place in ranks.values()}) == NODES


def test_all_meet_at_one_address(ranks: dict[int, list[str]]) -> None:
    meeting = {tuple(place[len(NAMES) : len(NAMES) + 2]) for place in ranks.values()}
    assert len(meeting) == 1
    address, port = meeting.pop()
    assert address
    assert 0 < int(port) < 65536


def test_all_are_told_the_same(ranks: dict[int, list[str]]) -> None:
    assert {tuple(place[len(NAMES) + 2 :]) for place in ranks.values()} == {("--config", "65b")}
