"""What `train` and `preflight` do with a run whose settings are valid: print its plan, check it from every
rank, or train it while it is watched.

As in commands.py, functions import what they need when they run: a plan loads no torch, and the process that
watches has loaded none when it forks.
"""

import gc
import os
from contextlib import suppress
from functools import partial
from pathlib import Path

import typer

from llama_mcore.checkpoint.run_lock import was_taken_over
from llama_mcore.checkpoint.start import Start
from llama_mcore.config.schema import RunConfig
from llama_mcore.distributed.launch_env import RankInfo
from llama_mcore.errors import ConfigError, LlamaMcoreError, Problem, raise_all


def check_world_size(world_size: int, dry_run: bool) -> None:
    """Raises ConfigError."""
    if not dry_run:
        remedy = "add it, or start so many ranks by a launcher"
        raise ConfigError(Problem("--world-size", world_size, "is of --dry-run alone", remedy))
    if world_size < 1:
        raise ConfigError(Problem("--world-size", world_size, "must be at least 1"))


def check_attempts(run: RunConfig, anyway: bool) -> None:
    """Each rank for itself, before anything slow. `anyway`: the user asked to start whatever the last
    attempts came to, which counts for the first start of a job."""
    from llama_mcore.observe.goodput.attempts import is_requeued
    from llama_mcore.observe.goodput.no_progress import check_progress

    if not anyway or is_requeued(Path(run.run.dir)):
        check_progress(Path(run.run.dir), os.environ.get("SLURM_JOB_ID", ""))


def train_watched(run: RunConfig, start: Start) -> int:
    """Fork: this process watches the one that trains, and ends with its exit code."""
    from llama_mcore.watchdog.signals import stop_signals
    from llama_mcore.watchdog.supervisor import Supervisor

    run_dir = Path(run.run.dir)
    lost = partial(was_taken_over, run_dir)
    supervisor = Supervisor(run.watchdog, run_dir, run.checkpoint.timeout_s, lost)
    pulse = supervisor.fork()
    if pulse is None:
        return supervisor.watch()
    with stop_signals() as stop:
        from llama_mcore.distributed.device import (
            choose_device,
            compute_deterministically,
            hide_gpus,
            on_gpu,
            order_kernel_starts,
        )
        from llama_mcore.observe.log import silence_libraries

        choose_device(run.run.device)
        if not on_gpu():
            hide_gpus()
        order_kernel_starts(run.parallel.tp, run.zero.stage)
        if run.run.deterministic:
            compute_deterministically()
        silence_libraries(cpu=not on_gpu())
        from llama_mcore.observe.phases import Phases
        from llama_mcore.train.trainer import train

        # Modules stay to the end: DeepSpeed looks for garbage six times while it starts, a third of a second
        # each with them.
        gc.freeze()
        return train(run, stop, start, Phases([pulse], supervisor.began))


def print_plan(run: RunConfig, ranks: int, start: Start) -> None:
    """Print the plan and whether it can start."""
    from llama_mcore.checkpoint.run_dir import state_of
    from llama_mcore.diagnose.checks_run import unusable_files
    from llama_mcore.plan.dry_run import conclude, describe_run

    typer.echo(describe_run(run, ranks, state_of(Path(run.run.dir))))
    failures = unusable_files(run, lambda: typer.echo(_data_plan(run)), start, typer.echo)
    typer.echo(f"\n{conclude(run, ranks, sum(len(failure.problems) for failure in failures))}")
    raise_all(failures)


def preflight_run(run: RunConfig, place: RankInfo, asked: Start, *, json: bool, retry: bool = False) -> None:
    """Check it from every rank. `retry` as of `start` in diagnose/checks_run.py."""
    from functools import partial

    from llama_mcore.distributed.device import choose_device, on_gpu
    from llama_mcore.observe.log import silence_libraries
    from llama_mcore.plan.dry_run import describe_run

    choose_device(run.run.device)
    silence_libraries(cpu=not on_gpu())
    from llama_mcore.checkpoint.run_dir import state_of
    from llama_mcore.diagnose.checks_run import start
    from llama_mcore.diagnose.limited import LIMIT_S, within
    from llama_mcore.diagnose.preflight import preflight

    def plan() -> str:
        return describe_run(run, place.world_size, state_of(Path(run.run.dir)))

    def data_plan() -> str:
        with suppress(LlamaMcoreError):  # preflight finds it, on every rank
            return _data_plan(run)
        return ""

    if place.rank == 0 and not json:
        typer.echo("\n".join([*within(LIMIT_S, {"run": plan, "data": data_plan}).values(), ""]))
    preflight(run, json, partial(start, asked=asked, retry=retry))


def _data_plan(run: RunConfig) -> str:
    """What a run would read. Raises what `planned_data` raises."""
    from llama_mcore.data.data_plan import plan_table
    from llama_mcore.diagnose.checks_run import planned_data

    _, plan = planned_data(run)
    return f"\n{plan_table(plan, run.train.steps * run.train.global_batch_size)}"
