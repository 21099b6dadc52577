"""The shipped scripts on a real Slurm of virtual nodes on this machine: `make test-slurm`, as root.

What can happen to a job happens to several at a time: most of it is waiting. A case waits for what it sees of
a job, never for a time; a job whose end is of no interest has steps without end and is cancelled.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from llama_mcore.observe.goodput.attempts import MAX_FRUITLESS, read_ended_attempts
from tests.slurm.cluster import Job, cluster
from tests.support.errors import is_shown
from tests.support.models import Small
from tests.support.product import checkpoints, metrics
from tests.support.world import ROOT

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.process,
    pytest.mark.skipif(shutil.which("sbatch") is None, reason="needs Slurm"),
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to start Slurm"),
]
JOBS_AT_A_TIME, NODES_OF_A_JOB = 3, 2
OPTIONS = [f"--nodes={NODES_OF_A_JOB}", "--gpus-per-node=1"]
SETTINGS = ["--config", "tiny", "eval.interval=0", "checkpoint.interval=1000", "checkpoint.keep=9"]
WITHOUT_END = ["train.steps=100000", "data.epochs=9000"]
FEW, SOME = 5, 15
"""Steps."""


@dataclass
class Outcome:
    job: Job
    exit_code: str
    run_dir: Path

    def steps(self) -> list[int]:
        return [row["step"] for row in metrics(self.run_dir)]

    def steps_of(self, said: str) -> list[str]:
        """The numbers of the lines that say `INFO ... at step N`."""
        start = f" INFO {said} at step "
        ends = [line.partition(start)[2] for line in self.job.said().splitlines() if start in line]
        return [end.split()[0].rstrip(":,;") for end in ends]


@dataclass
class Case:
    slurm: dict[str, str]
    small: Small
    folder: Path

    @property
    def run_dir(self) -> Path:
        return self.folder / "run"

    def submit(
        self, *settings: str, options: tuple[str, ...] = (), checkout: Path = ROOT, until: int = 0
    ) -> Job:
        """Goes on for ever if `settings` do not say otherwise; returns after step `until`."""
        overrides = [*SETTINGS, *self.small.overrides(self.run_dir), *WITHOUT_END, *settings]
        job = Job(self.slurm, self.folder, *OPTIONS, *options, "slurm/65b.sh", *overrides, cwd=checkout)
        if until:
            job.wait_for_steps(self.run_dir, until)
        return job

    def until_the_end(self, job: Job) -> Outcome:
        return Outcome(job, job.ended(), self.run_dir)

    def comes_back(self, job: Job) -> Outcome:
        """Until it has done a step in its second attempt; then it has done enough."""
        job.comes_back()
        job.wait_until(lambda: "INFO resuming at step" in job.said())
        resumed = len(metrics(self.run_dir))
        job.wait_for_steps(self.run_dir, resumed + FEW)
        job.call("scancel", job.id)
        return self.until_the_end(job)


def finishes(case: Case) -> Outcome:
    return case.until_the_end(case.submit("train.steps=30", "data.epochs=9"))


def wrong_setting(case: Case) -> Outcome:
    return case.until_the_end(case.submit("optim.warmup_steps=999999"))


def signalled(case: Case) -> Outcome:
    job = case.submit("train.steps=150", "data.epochs=20", until=FEW)
    job.signal("USR1")
    return case.until_the_end(job)


def terminated(case: Case) -> Outcome:
    """Job that gets TERM, as by `sbatch --signal=B:TERM@300`; srun would kill all ranks instead."""
    job = case.submit(until=FEW)
    job.signal("TERM")
    return case.comes_back(job)


def preempted(case: Case, *options: str) -> Outcome:
    """A job of the high partition takes its nodes."""
    job = case.submit(options=options, until=FEW)
    folder = case.folder / "high"
    folder.mkdir()
    nodes = f"--nodelist={','.join(job.nodes())}"
    options = ["--partition=high", "--exclusive", f"--nodes={NODES_OF_A_JOB}", nodes]
    assert Job(case.slurm, folder, *options, "--wrap=sleep 1").ended() == "0:0"
    return case.comes_back(job)


def preempted_where_jobs_are_cancelled(case: Case) -> Outcome:
    return preempted(case, "--partition=cheap")


def soon_out_of_time(case: Case) -> Outcome:
    """Less is left than the script's --signal says: USR1."""
    job = case.submit(until=FEW)
    _limit(job, minutes=2)
    return case.comes_back(job)


def out_of_time(case: Case) -> Outcome:
    """Job that Slurm ends at its time limit without a signal."""
    job = case.submit(options=("--signal=B:CONT@1",), until=FEW)
    _limit(job, minutes=1)
    return case.comes_back(job)


def _limit(job: Job, minutes: int) -> None:
    """At most so many minutes from now, at least one less; and none for its next attempt."""
    for node in job.nodes():
        for process in job.processes(node):
            process.nice(5)  # it only waits, for a minute or two
    hours, ran, _ = (int(part) for part in job.field("RunTime").split(":"))
    job.call("scontrol", "update", f"JobId={job.id}", f"TimeLimit={60 * hours + ran + minutes}")
    job.wait_until(lambda: job.restarts() == 1)
    job.call("scontrol", "update", f"JobId={job.id}", "TimeLimit=UNLIMITED")


def cancelled(case: Case) -> Outcome:
    job = case.submit(until=FEW)
    job.call("scancel", job.id)
    return case.until_the_end(job)


def node_down(case: Case) -> Outcome:
    job = case.submit("checkpoint.interval=10", until=SOME)
    job.call("scontrol", "update", f"NodeName={job.nodes()[1]}", "State=DOWN", "Reason=test")
    return case.comes_back(job)


def rank_killed(case: Case) -> Outcome:
    """Rank of the second node that is killed, unnoticed by the first as in a collective of NCCL."""
    job = case.submit("checkpoint.interval=10", until=SOME)
    first, second = job.nodes()
    job.processes(first)[-1].suspend()
    job.processes(second)[-1].kill()
    return case.until_the_end(job)


def step_killed(case: Case) -> Outcome:
    """All that runs on one of its nodes is gone, at a site that lets jobs come back after a crash."""
    job = case.submit("checkpoint.interval=10", checkout=_site(case, requeue_on="75 1 137"), until=SOME)
    for process in job.processes(job.nodes()[1]):
        process.kill()
    return case.comes_back(job)


def no_progress(case: Case) -> Outcome:
    """A rank of its second node dies in each attempt, at a site that lets jobs come back after that."""
    job = case.submit(checkout=_site(case, requeue_on="75 137"))
    for restarts in range(MAX_FRUITLESS):
        job.comes_back(restarts)
        job.wait_until(lambda attempts=restarts + 1: job.said().count("parameters on 2 ranks") == attempts)
        job.processes(job.nodes()[1])[-1].kill()
    job.comes_back(MAX_FRUITLESS)
    job.wait_until(lambda: job.state() in ("SPECIAL_EXIT", "FAILED"))
    return Outcome(job, job.field("ExitCode"), case.run_dir)


def _site(case: Case, requeue_on: str) -> Path:
    """A checkout with settings of its own."""
    checkout = case.folder / "checkout"
    shutil.copytree(ROOT / "slurm", checkout / "slurm")
    (checkout / "tools").symlink_to(ROOT / "tools")
    with (checkout / "slurm" / "env.sh").open("a") as settings:
        settings.write(f'REQUEUE_ON="{requeue_on}"\n')
    return checkout


CASES: list[Callable[[Case], Outcome]] = [
    out_of_time,
    no_progress,
    soon_out_of_time,
    signalled,
    preempted,
    preempted_where_jobs_are_cancelled,
    step_killed,
    node_down,
    cancelled,
    rank_killed,
    finishes,
    wrong_setting,
    terminated,
]


@pytest.fixture(scope="module")
def outcomes(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, small: Small
) -> Iterator[dict[str, Future[Outcome]]]:
    """Outcomes of the cases that the selected tests are about, all running from the start."""
    folder = tmp_path_factory.mktemp("slurm")
    callspecs = [getattr(item, "callspec", None) for item in request.session.items]
    selected = [callspec.params.get("found") for callspec in callspecs if callspec]
    with (
        cluster(folder / "slurm", JOBS_AT_A_TIME * NODES_OF_A_JOB) as slurm,
        ThreadPoolExecutor(JOBS_AT_A_TIME) as at_a_time,
    ):
        yield {
            case.__name__: at_a_time.submit(case, _case(folder, case, slurm, small))
            for case in CASES
            if case in selected
        }


@pytest.fixture
def found(request: pytest.FixtureRequest, outcomes: dict[str, Future[Outcome]]) -> Outcome:
    """Outcome of the case given as the parameter."""
    return outcomes[request.param.__name__].result()


def _case(folder: Path, case: Callable[[Case], Outcome], slurm: dict[str, str], small: Small) -> Case:
    own = folder / case.__name__
    own.mkdir()
    return Case(slurm, small, own)


def of(*cases: Callable[[Case], Outcome]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("found", cases, indirect=True, ids=lambda case: case.__name__)


@pytest.mark.sample
@of(finishes)
def test_a_job_on_two_nodes_finishes(found: Outcome) -> None:
    assert found.exit_code == "0:0", found.job.said()
    assert found.steps() == list(range(1, 31))
    assert "Traceback" not in found.job.said()


@pytest.mark.sample
@of(wrong_setting)
def test_a_wrong_setting_ends_it_with_64(found: Outcome) -> None:
    assert found.exit_code == "64:0"
    assert is_shown(found.job.said(), "optim.warmup_steps", 999999, remedy=False)
    assert found.job.restarts() == 0


@pytest.mark.sample
@of(signalled)
def test_a_signal_saves_and_requeues_and_it_goes_on_to_the_end(found: Outcome) -> None:
    assert found.exit_code == "0:0", found.job.said()
    assert found.steps() == list(range(1, 151))
    assert found.job.restarts() == 1
    assert found.steps_of("resuming") == found.steps_of("stopped")
    assert "Traceback" not in found.job.said()


@of(terminated, preempted, preempted_where_jobs_are_cancelled, soon_out_of_time, out_of_time)
def test_who_is_asked_to_stop_saves_and_goes_on_where_it_was(found: Outcome) -> None:
    stopped, _ = found.steps_of("stopped")  # the second time it was cancelled
    assert found.steps_of("resuming") == [stopped]
    assert found.steps() == list(range(1, len(found.steps()) + 1))
    assert "could NOT be put back" not in found.job.said()
    assert "Traceback" not in found.job.said()


@of(cancelled)
def test_a_cancelled_job_saves_and_does_not_come_back(found: Outcome) -> None:
    assert found.job.state() == "CANCELLED"
    assert found.job.restarts() == 0
    assert len(checkpoints(found.run_dir)) == 1
    assert "could NOT be put back" not in found.job.said()


@of(node_down, step_killed)
def test_a_job_that_lost_a_node_goes_on_from_its_checkpoint(found: Outcome) -> None:
    assert found.job.restarts() == 1
    (resumed,) = found.steps_of("resuming")
    assert int(resumed) >= 10
    assert found.steps() == list(range(1, len(found.steps()) + 1))
    assert "could NOT be put back" not in found.job.said()


@pytest.mark.sample
@of(rank_killed)
def test_a_killed_rank_ends_the_job_and_it_fails(found: Outcome) -> None:
    assert found.job.state() == "FAILED"
    # srun, which ends after 20 s what is left, says less
    assert found.exit_code == "137:0", found.job.said()
    assert found.job.restarts() == 0
    (attempt,) = read_ended_attempts(found.run_dir)
    assert attempt.exit_code == 128 + 15  # it was ended, and that is on record


@of(no_progress)
def test_a_job_without_progress_is_held(found: Outcome) -> None:
    assert found.exit_code == "93:0", found.job.said()
    assert found.job.state() == "SPECIAL_EXIT"
    assert found.job.said().count("parameters on 2 ranks") == MAX_FRUITLESS
    assert "no progress: run.dir = " in found.job.said()
