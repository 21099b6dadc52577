"""Commands of `llama-mcore plan`, none of which loads torch.

Numbers arrive as text: 1.4T is one, and all that cannot be parsed are reported together, with the exit code
of any other wrong argument.
"""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from llama_mcore.cli.options import Debug, command_group
from llama_mcore.errors import report_errors
from llama_mcore.plan.layout.hardware import GPUS

app = command_group(
    "plan", "What to train, on how many tokens, and on which layout: answered before a GPU is taken."
)
Json = Annotated[bool, typer.Option("--json", help="Print JSON; docs/planner.md has its keys.")]
Model = Annotated[str, typer.Option(help="7b, 13b, 33b, 65b, llama2-70b, llama3-8b or llama3-70b.")]
SeqLength = Annotated[str, typer.Option(help="Tokens in a sequence; default: the model's.")]
Calibration = Annotated[
    Path | None,
    typer.Option(
        help="JSON of `llama-mcore benchmark step --json`, or of constants that replace the defaults."
    ),
]


@app.command("size")
def size(
    flops: Annotated[str, typer.Option(help="Training budget, e.g. 5.6e23.")] = "",
    gpus: Annotated[str, typer.Option(help="With --days: the training budget instead of --flops.")] = "",
    gpu: Annotated[str, typer.Option(help=f"One of {', '.join(GPUS)}.")] = "a100-80gb",
    days: Annotated[str, typer.Option(help="With --gpus: days for which all of them train.")] = "",
    mfu: Annotated[
        str,
        typer.Option(
            help="Share of the GPU's peak, at 6 N operations per token; default: with --gpus what the "
            "fastest layout is predicted to reach, else 0.4."
        ),
    ] = "",
    inference_tokens: Annotated[
        str, typer.Option(help="Tokens read and written over the model's lifetime, e.g. 10T.")
    ] = "0",
    loss: Annotated[str, typer.Option(help="Loss to reach, in nats per token by the law.")] = "",
    law: Annotated[
        str, typer.Option(help="epoch, or Hoffmann's own: hoffmann-3 or hoffmann-3-unrounded.")
    ] = "epoch",
    picture: Annotated[
        Path | None, typer.Option(help="Also draw loss against lifetime cost to this new PNG.")
    ] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Find how many parameters to train on how many tokens, for a budget, an expected amount of inference and
    optionally a loss; compare with LLaMA."""
    with report_errors(debug):
        from llama_mcore.plan.size.report import size_dict, size_parts
        from llama_mcore.plan.size.solve import parse_request
        from llama_mcore.plan.size.with_layout import plan_with_layout

        plan, how = plan_with_layout(
            parse_request(
                flops=flops,
                gpus=gpus,
                gpu=gpu,
                days=days,
                mfu=mfu,
                inference_tokens=inference_tokens,
                loss=loss,
                law=law,
            )
        )
        if picture:
            from llama_mcore.plan.size.plot import draw_size

            draw_size(plan, picture)
        if json:
            _print_json(size_dict(plan, how))
        else:
            from llama_mcore.plan.table import show

            show(size_parts(plan, how))


@app.command("data")
def data(
    tokens: Annotated[str, typer.Option(help="Tokens that the run reads, e.g. 1.4T.")],
    mixture: Annotated[str, typer.Option(help="A mixture's file, or a shipped one.")] = "mixture_llama1",
    tokens_available: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=TOKENS", help="Tokens that a source has; default: those of the paper's Table 1."
        ),
    ] = None,
    max_epochs: Annotated[str, typer.Option(help="Epochs beyond which a source counts as too small.")] = "4",
    preprocess_mb_per_s: Annotated[
        str, typer.Option(help="MB of text that one core tokenizes per second.")
    ] = "30",
    cores: Annotated[str, typer.Option(help="Cores that preprocess.")] = "1",
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Compute what a mixture must hold for a number of tokens: epochs per source, shortfalls, disk, time."""
    with report_errors(debug):
        from llama_mcore.plan.data import plan_data

        plan = plan_data(tokens, mixture, tokens_available or (), max_epochs, preprocess_mb_per_s, cores)
        if json:
            _print_json(plan.to_dict())
        else:
            from llama_mcore.plan.table import show

            show(plan.parts())


@app.command("memory")
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
    gpu: Annotated[str, typer.Option(help="Check whether it fits this GPU.")] = "",
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Compute the memory of one rank, line by line."""
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
            _print_json(memory_json(found) | {"world_size": ranks} | fits)
        else:
            show_memory(run, ranks, found, kind)


@app.command("layout")
def layout(
    gpus: Annotated[str, typer.Option(help="Number of GPUs.")],
    gpu: Annotated[str, typer.Option(help=f"One of {', '.join(GPUS)}.")],
    tokens: Annotated[str, typer.Option(help="Tokens to train on, e.g. 1.4T or 300B.")],
    model: Model = "",
    num_layers: Annotated[str, typer.Option(help="With the next two: in place of --model.")] = "",
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
        str, typer.Option(help="Tokens in a step; K and M are 1,024 and its square here.")
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
    force: Annotated[bool, typer.Option("--force", help="Replace existing files.")] = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Find the fastest layouts that fit a number of GPUs, and how long they take."""
    with report_errors(debug):
        from llama_mcore.launch.slurm import SlurmJob, job_script
        from llama_mcore.launch.slurm import write_script as save_script
        from llama_mcore.plan.arguments import all_of
        from llama_mcore.plan.layout.arguments import (
            cluster_from_options,
            run_from_options,
            tokens_from_options,
        )
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
            lambda: cluster_from_options(gpu, gpus, network, gpus_per_node, calibration),
            lambda: run_from_options(model, seq_length, shape),
            lambda: tokens_from_options(tokens, global_batch_tokens),
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
            _print_json(found_json(found, cluster, shown) | {"model": name} | written)
            return
        show_layouts(name, found, cluster, shown)
        if write_script:
            typer.echo(f"\n{write_config} and {write_script} are written; start it: sbatch {write_script}")
        elif write_config:
            typer.echo(f"\n{write_config} is written; its job script: {command}")


@app.command("timeline")
def timeline(
    config: Annotated[str, typer.Option(help="A run's YAML or a shipped name.")],
    world_size: Annotated[str, typer.Option(help="Ranks, each with a GPU.")],
    gpu: Annotated[str, typer.Option(help=f"One of {', '.join(GPUS)}.")],
    network: Annotated[str, typer.Option(help="Between nodes; default: the GPU's usual.")] = "",
    gpus_per_node: Annotated[str, typer.Option(help="GPUs that NVLink joins.")] = "8",
    calibration: Calibration = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Show where the time of a run's step goes: one layer piece by piece, and what nothing hides."""
    with report_errors(debug):
        from llama_mcore.config.checks import check_config
        from llama_mcore.plan.arguments import all_of
        from llama_mcore.plan.layout.arguments import cluster_from_options, run_of_config
        from llama_mcore.plan.layout.footprint import memory_of
        from llama_mcore.plan.layout.search import Option, step_time
        from llama_mcore.plan.layout.timeline import timeline as timeline_of
        from llama_mcore.plan.layout.timeline import timeline_json, timeline_parts

        (run, ranks), cluster = all_of(
            lambda: run_of_config(config, world_size, {}),
            lambda: cluster_from_options(gpu, world_size, network, gpus_per_node, calibration),
        )
        check_config(run, ranks)
        found = timeline_of(Option(run, memory_of(run, ranks), step_time(run, cluster), cluster))
        if json:
            _print_json(timeline_json(found))
        else:
            from llama_mcore.plan.table import show

            show(timeline_parts(found, config))


@app.command("validate")
def validate(
    fit: Annotated[
        bool,
        typer.Option(
            "--fit", help="Print the constants that fit the first half best, as a calibration file."
        ),
    ] = False,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the tables of docs/planner.md.")
    ] = False,
    calibration: Calibration = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Compare the prediction with published training speeds."""
    with report_errors(debug):
        from llama_mcore.plan.arguments import one_of
        from llama_mcore.plan.layout import report, validation
        from llama_mcore.plan.layout.calibration import load_calibration
        from llama_mcore.plan.layout.efficiency import Efficiency, dump_efficiency

        one_of({"--fit": fit, "--markdown": markdown, "--json": json})
        one_of({"--fit": fit, "--calibration": calibration})
        if fit:
            typer.echo(dump_efficiency(validation.fit()), nl=False)
            return
        rows = validation.validate(load_calibration(calibration) if calibration else Efficiency())
        own = validation.validate_measured()
        if json:
            _print_json(report.validation_json(rows, own))
        elif markdown:
            typer.echo(f"{report.validation_markdown(rows)}\n\n{report.measured_markdown(own)}")
        else:
            report.show_validation(rows, own)


def _print_json(answer: dict[str, Any]) -> None:
    """Print JSON without NaN or infinity, which no other reader of JSON takes."""
    print(json.dumps(answer, indent=2, allow_nan=False))
