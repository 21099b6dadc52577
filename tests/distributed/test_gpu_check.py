"""llama_mcore.distributed.gpu_check: ranks that cannot compute together are refused before anything is
built."""

import os
import time
from pathlib import Path

import pytest
import torch

from llama_mcore.distributed import gpu_check
from llama_mcore.distributed.config import ParallelConfig
from llama_mcore.distributed.gpu_check import RankDevice, device_problems
from llama_mcore.distributed.groups import process_groups
from llama_mcore.errors import PreflightError, Problem
from tests.support.errors import check_problem, is_shown
from tests.support.models import Small
from tests.support.product import run_command
from tests.support.world import exit_codes_of, run_ranks, write_output_to


def ranks(*gpus: str, gpus_seen: int = 1) -> list[RankDevice]:
    """host/GPU of each rank; no GPU after the slash: a CPU."""
    return [
        RankDevice(rank, *place.split("/"), gpus=gpus_seen if place[-1] != "/" else 0)
        for rank, place in enumerate(gpus)
    ]


@pytest.mark.parametrize(
    "places",
    [
        ("a/", "a/"),
        ("a/x",),
        ("a/x", "a/y"),
        ("a/x", "b/x"),  # the same name on another host is another GPU
    ],
)
def test_one_device_each(places: tuple[str, ...]) -> None:
    assert device_problems(ranks(*places)) == []


def test_two_ranks_on_one_gpu() -> None:
    (problem,) = device_problems(ranks("a/x", "a/x"))
    check_problem([problem], "ranks on one GPU", "0, 1 on a")
    for remedy in ("--nproc-per-node 1", "parallel.tp", "run.device=cpu"):
        assert remedy in problem.remedy


def test_one_problem_for_each_host_that_has_too_few() -> None:
    found = device_problems(ranks("a/x", "a/y", "a/x", "a/y", "b/x", "b/x", "c/x", gpus_seen=2))
    assert [problem.value for problem in found] == ["0, 1, 2, 3 on a", "4, 5 on b"]
    assert all("--nproc-per-node 2" in problem.remedy for problem in found)


def test_some_with_and_some_without() -> None:
    (problem,) = device_problems(ranks("a/x", "a/y", "b/", "b/"))
    check_problem([problem], "ranks without a GPU", "2, 3 on b")


def test_the_same_problem_of_many_ranks_is_told_once() -> None:
    full = Problem("GPU", "cuda:0", "has no memory left", "take another")
    found = device_problems([RankDevice(rank, "a", f"gpu-{rank}", 1, full) for rank in range(20)])
    (problem,) = found
    assert problem.value == "cuda:0 (rank 0, 1, 2, 3, 4, 5, 6, 7 on a and 12 more)"


def told_to_all(places: list[str]) -> list[str]:
    """Join a job where each rank finds this device."""
    place = places[int(os.environ["RANK"])]
    gpu_check._taken = lambda rank: (torch.device("cpu"), RankDevice(rank, *place.split("/"), gpus=1))
    try:
        with process_groups(ParallelConfig(), seed=0) as groups:
            return [f"joined as {groups.rank}"]
    except PreflightError as error:
        assert not torch.distributed.is_initialized()
        return [str(problem.field) for problem in error.problems]


def told_late(places: list[str]) -> list[str]:
    """The same where rank 1 is slow to read what was found."""
    if os.environ["RANK"] == "1":
        gpu_check.PrefixStore = SlowStore
    return told_to_all(places)


class SlowStore(gpu_check.PrefixStore):
    def get(self, key: str) -> bytes:
        if key == "problems":
            time.sleep(2.0)
        return super().get(key)


@pytest.mark.process
def test_every_rank_learns_it_before_the_job_is_joined() -> None:
    assert run_ranks(3, told_to_all, ["a/x", "a/x", "b/x"]) == [["ranks on one GPU"]] * 3
    assert run_ranks(2, told_late, ["a/x", "a/x"]) == [["ranks on one GPU"]] * 2
    assert run_ranks(2, told_to_all, ["a/x", "a/y"]) == [["joined as 0"], ["joined as 1"]]


def joined_twice() -> int:
    """Two jobs of one process through one store do not read each other's answers."""
    for _ in range(2):
        with process_groups(ParallelConfig(), seed=0) as groups:
            size = groups.world_size
    return size


@pytest.mark.process
def test_a_process_may_join_again() -> None:
    assert run_ranks(2, joined_twice) == [2, 2]


def on_one_gpu(words: list[str], output: Path) -> None:
    """A command in ranks that all see the same GPU."""
    write_output_to(output)
    gpu_check._taken = lambda rank: (torch.device("cpu"), RankDevice(rank, "a", "GPU-5e1f", 1))
    run_command(words)


@pytest.mark.process
@pytest.mark.parametrize("command", [["train"], ["train", "--dry-run"], ["preflight"]])
def test_commands_refuse_it_with_one_message(small: Small, tmp_path: Path, command: list[str]) -> None:
    output = tmp_path / "output.txt"
    words = [*command, "--config", "tiny", *small.overrides(tmp_path / "run")]
    assert exit_codes_of(2, on_one_gpu, words, output) == [69, 69]
    said = output.read_text()
    assert is_shown(said, "ranks on one GPU", "0, 1 on a")
    assert said.count("ranks on one GPU") == 1
    assert "Traceback" not in said
    assert not (tmp_path / "run/checkpoints").exists()
