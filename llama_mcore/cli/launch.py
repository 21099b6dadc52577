"""Commands that start runs on a cluster and look at the machine: torchrun, slurm, doctor."""

from pathlib import Path
from typing import Annotated

import typer

from llama_mcore.cli.options import Config, Debug, Json, command_group
from llama_mcore.errors import leave, report_errors

app = command_group()


@app.command("doctor")
def doctor(json: Json = False, debug: Debug = False) -> None:
    """Report what is installed here, what is missing, what that costs and how to get it; exit code 69 if a
    training run could not start."""
    with report_errors(debug):
        from llama_mcore.diagnose.doctor import doctor

        doctor(as_json=json)


@app.command(
    "slurm",
    context_settings={"allow_extra_args": True},
    options_metavar="--config NAME --nodes N [section.key=value ...]",
)
def slurm(
    context: typer.Context,
    config: Config,
    nodes: Annotated[int, typer.Option(help="Nodes of the job.")],
    gpus_per_node: Annotated[int, typer.Option(help="GPUs, and so ranks, on each node.")] = 8,
    time: Annotated[str, typer.Option(help="Time limit, in the form that sbatch takes.")] = "24:00:00",
    signal_seconds: Annotated[
        int, typer.Option(help="Seconds before the limit at which the run saves and is requeued.")
    ] = 180,
    job_name: Annotated[str | None, typer.Option(help="Default: the name of the run's folder.")] = None,
    partition: Annotated[str | None, typer.Option(help="Default: the site's.")] = None,
    account: Annotated[str | None, typer.Option(help="Default: the site's.")] = None,
    qos: Annotated[str | None, typer.Option(help="Default: the site's.")] = None,
    data_later: Annotated[
        bool, typer.Option("--data-later", help="Do not check the data now, only when the job starts.")
    ] = False,
    output: Annotated[Path | None, typer.Option(help="Script to write; default: print it.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing script.")] = False,
    debug: Debug = False,
) -> None:
    """Write the sbatch script of a run, like those in slurm/, after every check that needs no GPU."""
    with report_errors(debug):
        from llama_mcore.launch.slurm import SlurmJob, job_script, write_script

        job = SlurmJob(nodes, gpus_per_node, time, signal_seconds, job_name, partition, account, qos)
        script = job_script(config, context.args, job, data_later=data_later)
        if output is None:
            typer.echo(script, nl=False)
        else:
            write_script(script, output, force=force)


@app.command(
    "torchrun",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
)
def torchrun(context: typer.Context) -> None:
    """Run torchrun, which here passes signals to the workers and returns their exit code."""
    from llama_mcore.watchdog.signals import held_stop_signals

    with held_stop_signals():
        from llama_mcore.launch.torchrun import run

        leave(run(context.args))
