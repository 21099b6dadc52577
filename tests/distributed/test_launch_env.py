"""llama_mcore.distributed.launch_env, on the variables that Slurm 22.05, torchrun and deepspeed really
set."""

import pytest

from llama_mcore.distributed.launch_env import (
    FIRST_PORT,
    PORTS,
    RankInfo,
    first_host,
    rank_from_environment,
    rank_info,
)
from llama_mcore.errors import PreflightError
from tests.support.errors import check_problem

JOB = {
    "SLURM_JOB_ID": "4",
    "SLURM_JOB_NODELIST": "n[1-2]",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_NNODES": "2",
    "SLURM_TASKS_PER_NODE": "2(x2)",
}
# `salloc -N2 --ntasks-per-node=2`
SALLOC = JOB | {"SLURM_NTASKS": "4", "SLURM_NPROCS": "4", "SLURM_NTASKS_PER_NODE": "2"}
# `sbatch -N2`: the script itself
SBATCH = JOB | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_GTIDS": "0"}
# `salloc` where its shell is a step of its own (LaunchParameters=use_interactive_step)
SHELL_ON_NODE = SALLOC | {
    "SLURM_STEP_ID": "4294967290",
    "SLURM_PROCID": "0",
    "SLURM_STEP_NUM_TASKS": "1",
    "SLURM_STEP_TASKS_PER_NODE": "1",
    "SLURM_STEP_NODELIST": "n1",
    "SLURM_STEP_NUM_NODES": "1",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
}
# task 2 of `srun -n3` in that salloc, which puts two on the first node
SRUN = SALLOC | {
    "SLURM_NTASKS": "3",
    "SLURM_STEP_ID": "1",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NUM_TASKS": "3",
    "SLURM_STEP_TASKS_PER_NODE": "2,1",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "1",
}
TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "GROUP_RANK": "1",
    "MASTER_ADDR": "head",
    "MASTER_PORT": "29511",
    "TORCHELASTIC_RUN_ID": "job7",
}
DEEPSPEED = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_SIZE": "4",
    "CROSS_RANK": "1",
    "CROSS_SIZE": "2",
    "MASTER_ADDR": "head",
    "MASTER_PORT": "29511",
}
AS_TORCHRUN_SAID = RankInfo(5, 8, 1, 4, 1, "head", 29511, "job7")
NOT_SET = "(not set)"
ONE_NODE = {"SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_TASKS_PER_NODE": "3", "SLURM_NODEID": "0"}


@pytest.mark.parametrize(
    ("variables", "place"),
    [
        ({}, RankInfo()),
        (SALLOC, RankInfo()),
        (SBATCH, RankInfo()),
        (SHELL_ON_NODE, RankInfo()),
        (TORCHRUN, AS_TORCHRUN_SAID),
        (SBATCH | TORCHRUN, AS_TORCHRUN_SAID),
        (SRUN | TORCHRUN, AS_TORCHRUN_SAID),
        (DEEPSPEED, RankInfo(5, 8, 1, 4, 1, "head", 29511, "")),
        (SRUN, RankInfo(2, 3, 0, 1, 1, "n1", FIRST_PORT + 4 + 101, "4.1")),
        (
            SRUN | {"SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_NODEID": "0"},
            RankInfo(1, 3, 1, 2, 0, "n1", FIRST_PORT + 4 + 101, "4.1"),
        ),
        # srun --preserve-env: the job's
        (SRUN | {"SLURM_NTASKS": "4"}, RankInfo(2, 3, 0, 1, 1, "n1", FIRST_PORT + 4 + 101, "4.1")),
        (SRUN | ONE_NODE, RankInfo(2, 3, 0, 3, 0, "localhost", FIRST_PORT + 4 + 101, "4.1")),
        (
            SRUN | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "77"},
            RankInfo(2, 3, 0, 1, 1, "10.0.0.1", 77, "4.1"),
        ),
    ],
    ids=[
        "nobody",
        "salloc",
        "sbatch",
        "shell-on-node",
        "torchrun",
        "torchrun-in-sbatch",
        "torchrun-in-srun",
        "deepspeed",
        "srun",
        "srun-on-first-node",
        "srun-preserve-env",
        "srun-on-one-node",
        "address-given",
    ],
)
def test_the_place_is_what_the_launcher_said(variables: dict[str, str], place: RankInfo) -> None:
    assert rank_info(variables) == place


def test_others_find_it_in_the_variables_of_torchrun() -> None:
    variables = dict(SRUN)
    place = rank_from_environment(variables)
    assert {name: variables[name] for name in TORCHRUN} == place.variables()
    assert rank_from_environment(variables) == place
    assert rank_info(TORCHRUN).variables() == TORCHRUN


def test_alone_nothing_is_set() -> None:
    variables = dict(SBATCH)
    assert rank_from_environment(variables).is_single_process
    assert variables == SBATCH


def test_the_port_is_one_that_no_client_is_given() -> None:
    for job in ("1", "11999", "12000", "4294967295"):
        assert FIRST_PORT <= rank_info(SRUN | {"SLURM_JOB_ID": job}).master_port < FIRST_PORT + PORTS <= 32768


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("n[1-3,7]", "n1"),
        ("n[007-128]", "n007"),
        ("n[7,1-3],a1", "n7"),
        ("a.b-c_1,n[1-3]", "a.b-c_1"),
        ("rack[1-2]node[03-04]-ib", "rack1node03-ib"),
    ],
)
def test_first_of_a_list_of_nodes(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


@pytest.mark.parametrize("nodes", ["", "n[1-3", "n[]", "n[a-b]", "n[1-3];ls", "(null)", "n 1", "n]1["])
def test_any_other_list_is_refused(nodes: str) -> None:
    with pytest.raises(ValueError):
        first_host(nodes)


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"RANK": "0"}, {"WORLD_SIZE": NOT_SET, "MASTER_ADDR": NOT_SET, "MASTER_PORT": NOT_SET}),
        (TORCHRUN | {"RANK": "-1", "WORLD_SIZE": "x"}, {"RANK": "-1", "WORLD_SIZE": "x"}),
        (TORCHRUN | {"RANK": "8"}, {"RANK": "8"}),
        (TORCHRUN | {"LOCAL_RANK": "4"}, {"LOCAL_RANK": "4"}),
        (TORCHRUN | {"MASTER_PORT": "65536"}, {"MASTER_PORT": "65536"}),
        (SRUN | {"SLURM_STEP_NODELIST": "n[1-"}, {"SLURM_STEP_NODELIST": "n[1-"}),
        (SRUN | {"SLURM_NODEID": "2"}, {"SLURM_STEP_TASKS_PER_NODE": "2,1"}),
        (SRUN | {"SLURM_PROCID": "3"}, {"SLURM_PROCID": "3"}),
        (
            {name: SRUN[name] for name in ("SLURM_STEP_ID", "SLURM_PROCID")},
            {"SLURM_JOB_ID": NOT_SET, "SLURM_LOCALID": NOT_SET},
        ),
    ],
)
def test_what_is_missing_or_wrong_is_named(variables: dict[str, str], named: dict[str, str]) -> None:
    with pytest.raises(PreflightError) as caught:
        rank_info(variables)
    for name, value in named.items():
        check_problem(caught.value.problems, name, value)
