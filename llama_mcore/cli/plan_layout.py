"""The commands `plan memory`, `plan layout` and `plan validate`; they load no torch. Numbers are text here as
they are in cli/plan.py."""

from pathlib import Path
from typing import Annotated

import typer

from llama_mcore.cli.as_json import print_json
from llama_mcore.errors import report_errors
from llama_mcore.plan.layout.hardware import GPUS

Model = Annotated[str, typer.Option(help="7b, 13b, 33b, 65b, llama2-70b, llama3-8b or llama3-70b.")]
SeqLength = Annotated[str, typer.Option(help="Tokens in a sequence; default: the model's.")]
Calibration = Annotated[
    Path | None,
    typer.Option(help="JSON of `tools/benchmark.py step --json`, or of constants that replace the defaults."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Debug = Annotated[bool, typer.Option("--debug", help="Print a traceback with an error.")]


def add_commands(app: typer.Typer) -> None:
    """Add the commands to `llama-mcore plan`."""
    app.command("memory")(memory)
    app.command("layout")(layout)
    app.command("validate")(validate)


def memory(
    model: Model = "",
    config: Annotated[
        str,
        typer.Option(help="A run's YAML or a shipped name, with --world-size in place of the rest."),
    ] = "",
    world_size: Annotated[str, typer.Option(help="With --config: ranks.")] = "",
    tp: Annotated[str, typer.Option(help="Tensor-parallel ranks; default: 1.")] = "",
    sp: Annotated[bool, typer.Option("--sp", help="Sequence parallelism.")] = False,
    dp: Annotated[str, typer.Option(help="Data-parallel ranks; default: 1.")] = "",
    zero: Annotated[str, typer.Option(help="ZeRO stage, 0 to 3; default: 1.")] = "",
    micro_batch: Annotated[str, typer.Option(help="Sequences of one forward; default: 1.")] = "",
    recompute: Annotated[str, typer.Option(help="none, selective or full; default: selective.")] = "",
    precision: Annotated[str, typer.Option(help="bf16 or fp32; default: bf16.")] = "",
    seq_length: SeqLength = "",
    gpu: Annotated[str, typer.Option(help="Say whether it fits this GPU.")] = "",
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Memory of one rank, line by line."""
    with report_errors(debug):
        from llama_mcore.config.checks import check_config
        from llama_mcore.plan.arguments import all_of
        from llama_mcore.plan.layout.arguments import one_micro_batch, run_of_config
        from llama_mcore.plan.layout.footprint import memory_of
        from llama_mcore.plan.layout.hardware import gpu as gpu_named
        from llama_mcore.plan.layout.report import memory_json, show_memory

        described = {
            "--model": model,
            "--tp": tp,
            "--sp": "given" if sp else "",
            "--dp": dp,
            "--zero": zero,
            "--micro-batch": micro_batch,
            "--recompute": recompute,
            "--precision": precision,
            "--seq-length": seq_length,
        }
        (run, ranks), kind = all_of(
            lambda: (
                run_of_config(config, world_size, described)
                if config
                else one_micro_batch(described, world_size)
            ),
            lambda: gpu_named(gpu) if gpu else None,
        )
        check_config(run, ranks)
        found = memory_of(run, ranks)
        if json:
            fits = {} if kind is None else {"gpu": kind.name, "fits": found.total <= kind.memory_bytes}
            print_json(memory_json(found) | {"world_size": ranks} | fits)
        else:
            show_memory(run, ranks, found, kind)


def layout(
    gpus: Annotated[str, typer.Option(help="How many GPUs.")],
    gpu: Annotated[str, typer.Option(help=f"One of {', '.join(GPUS)}.")],
    tokens: Annotated[str, typer.Option(help="Tokens to train on, e.g. 1.4T or 300B.")],
    model: Model = "",
    num_layers: Annotated[str, typer.Option(help="With the next two: instead of --model.")] = "",
    hidden_size: Annotated[str, typer.Option(help="Width of the model.")] = "",
    num_attention_heads: Annotated[str, typer.Option(help="Query heads.")] = "",
    ffn_hidden_size: Annotated[str, typer.Option(help="Default: 8/3 of the width, in steps of 256.")] = "",
    num_query_groups: Annotated[str, typer.Option(help="Key/value heads; default: the query heads.")] = "",
    vocab_size: Annotated[str, typer.Option(help="Default: 32000.")] = "",
    network: Annotated[
        str,
        typer.Option(help="Between nodes, e.g. ib-200x8: 8 links of 200 Gbit/s; default: the GPU's usual."),
    ] = "",
    global_batch_tokens: Annotated[
        str, typer.Option(help="Tokens of a step; K and M are 1,024 and its square here.")
    ] = "4M",
    seq_length: SeqLength = "",
    gpus_per_node: Annotated[str, typer.Option(help="GPUs that NVLink joins.")] = "8",
    top: Annotated[str, typer.Option(help="Layouts to show.")] = "10",
    calibration: Calibration = None,
    write_config: Annotated[
        Path | None, typer.Option(help="Write the run of the first layout to this YAML file.")
    ] = None,
    write_script: Annotated[
        Path | None, typer.Option(help="With --write-config: also the sbatch script that trains it.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace files that are there.")] = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """The fastest layouts for so many GPUs that run and fit; how long they take."""
    with report_errors(debug):
        from llama_mcore.launch.slurm import SlurmJob, job_script
        from llama_mcore.launch.slurm import write_script as save_script
        from llama_mcore.plan.arguments import all_of
        from llama_mcore.plan.layout.arguments import asked_cluster, asked_run, asked_tokens
        from llama_mcore.plan.layout.report import found_json, show_layouts
        from llama_mcore.plan.layout.search import Goal, check_model, nothing_fits, search
        from llama_mcore.plan.layout.to_run import check_files, launch_command, nodes_of, write_run
        from llama_mcore.units import format_count, parse_count

        shape = {
            "--num-layers": num_layers,
            "--hidden-size": hidden_size,
            "--num-attention-heads": num_attention_heads,
            "--ffn-hidden-size": ffn_hidden_size,
            "--num-query-groups": num_query_groups,
            "--vocab-size": vocab_size,
        }
        cluster, run, (count, batch), shown, _ = all_of(
            lambda: asked_cluster(gpu, gpus, network, gpus_per_node, calibration),
            lambda: asked_run(model, seq_length, shape),
            lambda: asked_tokens(tokens, global_batch_tokens),
            lambda: int(parse_count("--top", top, 1, 1000, whole=True)),
            lambda: check_files(write_config, write_script),
        )
        goal = Goal(run, count, batch / run.model.seq_length)
        check_model(goal)
        name = model or f"{format_count(run.model.num_params())} parameters"
        found = search(goal, cluster)
        if not found.options:
            raise nothing_fits(goal, cluster, found.rejected)
        if write_config:
            write_run(found.options[0], write_config, write_script, force=force)
        if write_config and write_script:
            job = SlurmJob(*nodes_of(found.options[0].cluster))
            content = job_script(str(write_config), [], job, data_later=True)
            save_script(content, write_script, force=force)
        command = launch_command(found.options[0], write_config) if write_config else ""
        if json:
            written = {"config": str(write_config), "slurm_command": command} if write_config else {}
            if write_script:
                written["script"] = str(write_script)
            print_json(found_json(found, cluster, shown) | {"model": name} | written)
            return
        show_layouts(name, found, cluster, shown)
        if write_script:
            typer.echo(f"\n{write_config} and {write_script} are written; start it: sbatch {write_script}")
        elif write_config:
            typer.echo(f"\n{write_config} is written; its job script: {command}")


def validate(
    fit: Annotated[
        bool,
        typer.Option(
            "--fit", help="Print the constants that fit the first half best, as a calibration file."
        ),
    ] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table of docs/planner.md.")] = False,
    calibration: Calibration = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """The prediction against published training speeds."""
    with report_errors(debug):
        from llama_mcore.plan.arguments import one_of
        from llama_mcore.plan.layout import report
        from llama_mcore.plan.layout.calibration import load_calibration
        from llama_mcore.plan.layout.efficiency import Efficiency, dump_efficiency
        from llama_mcore.plan.validate import compare

        one_of({"--fit": fit, "--markdown": markdown, "--json": json})
        one_of({"--fit": fit, "--calibration": calibration})
        if fit:
            typer.echo(dump_efficiency(compare.fit()), nl=False)
            return
        rows = compare.validate(load_calibration(calibration) if calibration else Efficiency())
        if json:
            print_json(report.validation_json(rows))
        elif markdown:
            typer.echo(report.validation_markdown(rows))
        else:
            report.show_validation(rows)
