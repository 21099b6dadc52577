"""Rank, world and rendezvous address of this process, read from its launcher's variables. Loads no torch.

| started by | it has set | then |
|---|---|---|
| torchrun, also under srun or in a job's shell | RANK, WORLD_SIZE, ... beside SLURM_* | torchrun's |
| deepspeed | RANK, WORLD_SIZE, LOCAL_SIZE, CROSS_RANK, ... | deepspeed's |
| srun | SLURM_STEP_ID below 2^32 - 6, SLURM_PROCID, ... | srun's |
| the shell of an sbatch script | SLURM_PROCID = 0, SLURM_JOB_*, no SLURM_STEP_ID | alone |
| a shell that salloc opened on the login node | SLURM_NTASKS, SLURM_JOB_*, no SLURM_PROCID | alone |
| a shell that salloc opened on the first node | SLURM_STEP_ID = 2^32 - 6, SLURM_PROCID = 0 | alone |
| a shell that `srun --pty` opened | a step of one task | srun's: one rank |
| a person | nothing | alone |

SLURM_NTASKS is the job's in some of these shells and the step's in others: the step's own are
SLURM_STEP_NUM_TASKS and SLURM_STEP_TASKS_PER_NODE. MASTER_ADDR and MASTER_PORT, where set, take precedence.
"""

import os
import re
import socket
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field

from llama_mcore.errors import PreflightError, Problem

# Set by `llama-mcore torchrun` for its workers: where they report that they are alive (watchdog/liveness.py).
OUR_TORCHRUN = "LLAMA_MCORE_TORCHRUN"
# slurm.h: steps from SLURM_INTERACTIVE_STEP on are shells, batch scripts and the like; srun counts from 0.
FIRST_SPECIAL_STEP = 0xFFFFFFFA
# Below 32768, where Linux begins to give ports to whoever connects to somewhere.
FIRST_PORT, PORTS = 20_000, 12_000
# So that steps of one job, and jobs that follow each other, seldom meet.
PORTS_BETWEEN_STEPS = 101


@dataclass(frozen=True)
class RankInfo:
    """Place of a process in its job. Alone: rank 0 of 1, with no address."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    node: int = 0
    master_address: str = ""
    master_port: int = 0
    job: str = ""
    """Tells jobs apart that share a machine; empty where the launcher has no name for it."""
    host: str = field(default_factory=socket.gethostname)

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host}"

    @property
    def is_single_process(self) -> bool:
        """True if it was started without a launcher."""
        return not self.master_address

    def variables(self) -> dict[str, str]:
        """Variables that torchrun would have set, for torch and DeepSpeed; none if alone."""
        if self.is_single_process:
            return {}
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_RANK": str(self.local_rank),
            "LOCAL_WORLD_SIZE": str(self.local_world_size),
            "GROUP_RANK": str(self.node),
            "MASTER_ADDR": self.master_address,
            "MASTER_PORT": str(self.master_port),
            "TORCHELASTIC_RUN_ID": self.job,
        }


def rank_from_environment(variables: MutableMapping[str, str] = os.environ) -> RankInfo:
    """The place of this process, also set in `variables` as torchrun would have.

    Call it before anything reads torchrun's variables. Raises PreflightError as `rank_info` does.
    """
    place = rank_info(variables)
    variables.update(place.variables())
    return place


def rank_info(variables: Mapping[str, str]) -> RankInfo:
    """The place of this process. Raises PreflightError with every variable that is missing or wrong."""
    if "RANK" in variables:
        return _by_torchrun(variables)
    if _in_step_of_srun(variables):
        return _by_srun(variables)
    return RankInfo()


def started_by_torchrun(variables: Mapping[str, str]) -> bool:
    """True if torchrun started it: not another launcher that sets some of the same names, nor
    `rank_from_environment`."""
    return "TORCHELASTIC_RESTART_COUNT" in variables


def started_by_our_torchrun(variables: Mapping[str, str]) -> bool:
    """True if `llama-mcore torchrun` did, which passes stop requests on as USR1: its TERM never is one."""
    return started_by_torchrun(variables) and OUR_TORCHRUN in variables


def first_host(nodes: str) -> str:
    """First host of a list as Slurm writes it: `n1` of "n[1-3,7],m2". Raises ValueError for other forms."""
    numbers = r"\d+(?:-\d+)?"
    ranges = rf"\[{numbers}(?:,{numbers})*\]"
    found = re.match(rf"(?:[\w.-]|{ranges})+(?=,|$)", nodes, re.ASCII)
    if found is None:
        raise ValueError(f"{nodes!r} is not a list of nodes")
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", found[0])


def _in_step_of_srun(variables: Mapping[str, str]) -> bool:
    step = variables.get("SLURM_STEP_ID", "")
    return step.isdecimal() and int(step) < FIRST_SPECIAL_STEP


class _Reader:
    """Reader of variables that collects the problems with them."""

    def __init__(self, variables: Mapping[str, str], launcher: str, remedy: str) -> None:
        self._variables, self._launcher, self._remedy = variables, launcher, remedy
        self._problems: list[Problem] = []

    def number(self, *names: str, default: int | None = None) -> int:
        """Value of the first of `names` that is set; `default` if none is."""
        name = next((name for name in names if self._variables.get(name)), names[0])
        text = self._variables.get(name, "")
        if not text and default is not None:
            return default
        if text.isdecimal() and text.isascii():
            return int(text)
        self.refuse(name, text or "(not set)", "must be a whole number")
        return 0

    def text(self, name: str) -> str:
        if not self._variables.get(name):
            self.refuse(name, "(not set)", "must be set")
        return self._variables.get(name, "")

    def refuse(self, name: str, value: object, reason: str, remedy: str = "") -> None:
        self._problems.append(Problem(name, value, f"{reason} ({self._launcher})", remedy or self._remedy))

    def check(self, place: RankInfo, rank: str, local_rank: str) -> RankInfo:
        """`place`, unless there are problems; `rank` and `local_rank` are names of variables."""
        if not self._problems:
            pairs = (
                (rank, place.rank, place.world_size),
                (local_rank, place.local_rank, place.local_world_size),
            )
            for name, value, bound in pairs:
                if value >= bound:
                    self.refuse(name, value, f"must be below the number of processes, {bound}")
            if not 0 < place.master_port < 1 << 16:
                self.refuse("MASTER_PORT", place.master_port, "must be a port, from 1 to 65535")
        if self._problems:
            raise PreflightError(self._problems)
        return place


def _by_torchrun(variables: Mapping[str, str]) -> RankInfo:
    remedy = "start with torchrun or deepspeed, which set it; or unset RANK, which may be left over"
    read = _Reader(variables, "RANK is set", remedy)
    place = RankInfo(
        rank=read.number("RANK"),
        world_size=(world_size := read.number("WORLD_SIZE")),
        local_rank=(local_rank := read.number("LOCAL_RANK", default=0)),
        local_world_size=read.number(
            "LOCAL_WORLD_SIZE", "LOCAL_SIZE", default=max(world_size, local_rank + 1)
        ),
        node=read.number("GROUP_RANK", "CROSS_RANK", default=0),
        master_address=read.text("MASTER_ADDR"),
        master_port=read.number("MASTER_PORT"),
        job=variables.get("TORCHELASTIC_RUN_ID", ""),
    )
    return read.check(place, "RANK", "LOCAL_RANK")


def _by_srun(variables: Mapping[str, str]) -> RankInfo:
    read = _Reader(variables, "a step of srun", "start it with srun, which sets it, or with torchrun")
    job, step = (read.number(f"SLURM_{name}_ID") for name in ("JOB", "STEP"))
    node = read.number("SLURM_NODEID")
    place = RankInfo(
        rank=read.number("SLURM_PROCID"),
        world_size=read.number("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"),
        local_rank=read.number("SLURM_LOCALID"),
        local_world_size=_tasks_on_node(read, node),
        node=node,
        master_address=variables.get("MASTER_ADDR") or _first_node(read),
        master_port=read.number(
            "MASTER_PORT", default=FIRST_PORT + (job + PORTS_BETWEEN_STEPS * step) % PORTS
        ),
        job=f"{job}.{step}",
    )
    return read.check(place, "SLURM_PROCID", "SLURM_LOCALID")


def _first_node(read: _Reader) -> str:
    """Host of task 0. A step on one node needs no name that resolves."""
    if read.number("SLURM_STEP_NUM_NODES", "SLURM_NNODES") == 1:
        return "localhost"
    nodes = read.text("SLURM_STEP_NODELIST")
    try:
        return first_host(nodes) if nodes else ""
    except ValueError:
        remedy = "set MASTER_ADDR to the address of the node that runs task 0"
        read.refuse("SLURM_STEP_NODELIST", nodes, "is not a list of nodes in a known form", remedy)
        return ""


def _tasks_on_node(read: _Reader, node: int) -> int:
    """Number of the step's tasks on a node, from a list like "2(x3),1"."""
    name = "SLURM_STEP_TASKS_PER_NODE"
    text = read.text(name)
    counts: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part, re.ASCII)
        counts += [int(found[1])] * int(found[2] or 1) if found else []
    if node < len(counts):
        return counts[node]
    if text:
        read.refuse(name, text, f"must give the tasks on node {node}")
    return 1
