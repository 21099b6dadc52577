"""Commands on a run: train, preflight, goodput, audit-data.

As everywhere here, functions import what they need when they run: a plan loads no torch, and the process that
supervises has loaded none when it forks.
"""

import os
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llama_mcore.cli.options import Config, Debug, Json, command_group
from llama_mcore.errors import ConfigError, LlamaMcoreError, Problem, leave, raise_all, report_errors

if TYPE_CHECKING:
    from llama_mcore.checkpoint.start import Start
    from llama_mcore.config.schema import RunConfig
    from llama_mcore.distributed.launch_env import RankInfo

app = command_group()
RunDir = Annotated[Path, typer.Argument(help="Folder of the run.")]
InitFrom = Annotated[
    str, typer.Option(help="Checkpoint, or run folder, whose weights a new run begins with.")
]
LocalRank = Annotated[int, typer.Option("--local_rank", hidden=True, help="Set by deepspeed.")]


@app.command(
    "train",
    context_settings={"allow_extra_args": True},
    options_metavar="--config NAME [section.key=value ...]",
)
def train(
    context: typer.Context,
    config: Config,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check and print the plan; start nothing.")
    ] = False,
    world_size: Annotated[
        int | None, typer.Option(help="With --dry-run: ranks to plan for; default: parallel.tp.")
    ] = None,
    resume: Annotated[
        str,
        typer.Option(
            help="auto: from the newest checkpoint; never; or the folder of an older checkpoint of this run, "
            "to go back to it."
        ),
    ] = "auto",
    init_from: InitFrom = "",
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Move what the run's folder holds aside and start from scratch.")
    ] = False,
    accept_data_change: Annotated[
        bool,
        typer.Option("--accept-data-change", help="Resume with other data than before, and record that."),
    ] = False,
    retry: Annotated[
        bool, typer.Option("--retry", help="Start although the last attempts of the run saved nothing.")
    ] = False,
    local_rank: LocalRank = 0,
    debug: Debug = False,
) -> None:
    """Train, or resume, the run that a configuration describes. Start it with torchrun, srun or deepspeed."""
    from llama_mcore.watchdog.signals import held_stop_signals

    with held_stop_signals(), report_errors(debug):
        from llama_mcore.distributed.launch_env import rank_from_environment

        place = rank_from_environment()
        from llama_mcore.checkpoint.start import Start
        from llama_mcore.config.checks import check_config
        from llama_mcore.config.load import load_config

        start = Start(resume, init_from, fresh, accept_data_change)
        if world_size is not None:
            _check_world_size(world_size, dry_run)
        run = load_config(config, context.args)
        ranks = place.world_size
        if dry_run and (world_size or place.is_single_process):
            ranks = world_size or run.parallel.tp
        check_config(run, ranks)
        if not dry_run:
            _check_attempts(Path(run.run.dir), retry or fresh)
            leave(_train_supervised(run, start))
        from llama_mcore.train.ds_config import deepspeed_config

        deepspeed_config(run.zero, run.train, run.optim, run.parallel.dp(ranks))
        if place.is_single_process or world_size:
            _print_plan(run, ranks, start)
        else:
            _preflight(run, place, start, json=False, retry=retry or fresh)


@app.command(
    "preflight",
    context_settings={"allow_extra_args": True},
    options_metavar="--config NAME [section.key=value ...]",
)
def preflight(
    context: typer.Context,
    config: Config,
    init_from: InitFrom = "",
    json: Json = False,
    local_rank: LocalRank = 0,
    debug: Debug = False,
) -> None:
    """Check on every rank what would stop a run: data, folder, disk space, memory, network, clocks, versions.

    Start it as the run would be started; train --dry-run does the same under a launcher."""
    with report_errors(debug):
        from llama_mcore.distributed.launch_env import rank_from_environment

        place = rank_from_environment()
        from llama_mcore.checkpoint.start import Start
        from llama_mcore.config.checks import check_config
        from llama_mcore.config.load import load_config
        from llama_mcore.train.ds_config import deepspeed_config

        run = load_config(config, context.args)
        check_config(run, place.world_size)
        deepspeed_config(run.zero, run.train, run.optim, run.parallel.dp(place.world_size))
        _preflight(run, place, Start(init_from=init_from), json=json)


@app.command("goodput")
def goodput(
    run_dir: RunDir,
    json: Json = False,
    picture: Annotated[Path | None, typer.Option(help="Also draw it to this PNG.")] = None,
    debug: Debug = False,
) -> None:
    """Report where the time of a run went: steps, lost steps, saving, evaluation, restarting, waiting."""
    with report_errors(debug):
        from llama_mcore.observe.goodput.report import show_goodput

        show_goodput(run_dir, as_json=json, picture=picture)


@app.command("audit-data")
def audit_data(run_dir: RunDir, debug: Debug = False) -> None:
    """Prove from the data plan and the metrics how often a run has read every window."""
    with report_errors(debug):
        from llama_mcore.checkpoint.audit import audit_run

        typer.echo(audit_run(run_dir))


def _check_world_size(world_size: int, dry_run: bool) -> None:
    if not dry_run:
        remedy = "add --dry-run, or start this many ranks with a launcher"
        raise ConfigError(Problem("--world-size", world_size, "works only with --dry-run", remedy))
    if world_size < 1:
        raise ConfigError(Problem("--world-size", world_size, "must be at least 1"))


def _check_attempts(run_dir: Path, anyway: bool) -> None:
    """Refuse a run whose last attempts made no progress; each rank checks for itself, before anything slow.

    `anyway`: the user asked to start all the same, which counts for the first start of a job only.
    """
    from llama_mcore.observe.goodput.attempts import check_progress, is_requeued

    if not anyway or is_requeued(run_dir):
        check_progress(run_dir, os.environ.get("SLURM_JOB_ID", ""))


def _train_supervised(run: "RunConfig", start: "Start") -> int:
    """Fork: this process supervises the one that trains, and returns its exit code."""
    from llama_mcore.checkpoint.run_lock import was_taken_over
    from llama_mcore.watchdog.signals import stop_signals
    from llama_mcore.watchdog.supervisor import Supervisor

    run_dir = Path(run.run.dir)
    lost = partial(was_taken_over, run_dir)
    supervisor = Supervisor(run.watchdog, run_dir, run.checkpoint.timeout_s, lost)
    heartbeat = supervisor.fork()
    if heartbeat is None:
        return supervisor.watch()
    with stop_signals() as stop:
        from llama_mcore.api import train_until_stopped
        from llama_mcore.observe.phases import Phases

        return train_until_stopped(run, stop, start, Phases([heartbeat], supervisor.began))


def _print_plan(run: "RunConfig", ranks: int, start: "Start") -> None:
    """Print the plan and whether the run can start."""
    from llama_mcore.checkpoint.run_dir import state_of
    from llama_mcore.diagnose.checks_run import unusable_files
    from llama_mcore.plan.dry_run import conclude, describe_run

    typer.echo(describe_run(run, ranks, state_of(Path(run.run.dir))))
    failures = unusable_files(run, lambda: typer.echo(_data_plan(run)), start, typer.echo)
    typer.echo(f"\n{conclude(run, ranks, sum(len(failure.problems) for failure in failures))}")
    raise_all(failures)


def _preflight(
    run: "RunConfig", place: "RankInfo", requested: "Start", *, json: bool, retry: bool = False
) -> None:
    """Check the run on every rank. `retry` as in `start` of diagnose/checks_run.py."""
    from llama_mcore.api import prepare_process
    from llama_mcore.plan.dry_run import describe_run

    prepare_process(run.run.device)
    from llama_mcore.background import run_with_timeout
    from llama_mcore.checkpoint.run_dir import state_of
    from llama_mcore.diagnose.checks_run import start
    from llama_mcore.diagnose.preflight import FILES_LIMIT_S, preflight

    def plan() -> str:
        return describe_run(run, place.world_size, state_of(Path(run.run.dir)))

    def data_plan() -> str:
        with suppress(LlamaMcoreError):  # preflight finds it, on every rank
            return _data_plan(run)
        return ""

    if place.rank == 0 and not json:
        checks = {"run": plan, "data": data_plan}
        typer.echo("\n".join([*run_with_timeout(FILES_LIMIT_S, checks).values(), ""]))
    preflight(run, json, partial(start, request=requested, retry=retry))


def _data_plan(run: "RunConfig") -> str:
    """Table of what the run would read. Raises what `planned_data` raises."""
    from llama_mcore.data.data_plan import plan_table
    from llama_mcore.diagnose.checks_run import planned_data

    _, plan = planned_data(run)
    return f"\n{plan_table(plan, run.train.steps * run.train.global_batch_size)}"
