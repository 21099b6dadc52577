"""The commands `plan memory`, `plan layout` and `plan validate`; they load no torch."""

import json as json_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llama_mcore.errors import ConfigError, Problem, report_errors

if TYPE_CHECKING:
    from llama_mcore.config import RunConfig
    from llama_mcore.plan.search import Cluster

Model = Annotated[str, typer.Option(help="7b, 13b, 33b, 65b, llama2-70b, llama3-8b or llama3-70b.")]
SeqLength = Annotated[int | None, typer.Option(min=1, help="Tokens in a sequence; default: the model's.")]
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
    config: Annotated[str, typer.Option(help="A run's YAML or a shipped name, instead of --model.")] = "",
    world_size: Annotated[int, typer.Option(min=0, help="With --config: ranks.")] = 0,
    tp: Annotated[int, typer.Option(min=1, help="Tensor-parallel ranks.")] = 1,
    sp: Annotated[bool, typer.Option("--sp", help="Sequence parallelism.")] = False,
    dp: Annotated[int, typer.Option(min=1, help="Data-parallel ranks.")] = 1,
    zero: Annotated[int, typer.Option(min=0, max=3, help="ZeRO stage.")] = 1,
    micro_batch: Annotated[int, typer.Option(min=1, help="Sequences of one forward.")] = 1,
    recompute: Annotated[str, typer.Option(help="none, selective or full.")] = "selective",
    precision: Annotated[str, typer.Option(help="bf16 or fp32.")] = "bf16",
    seq_length: SeqLength = None,
    gpu: Annotated[str, typer.Option(help="Say whether it fits this GPU.")] = "",
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Memory of one rank, line by line."""
    with report_errors(debug):
        from llama_mcore.config import check_run, load_run
        from llama_mcore.plan.arguments import all_of
        from llama_mcore.plan.footprint import memory_of
        from llama_mcore.plan.hardware import gpu as gpu_named
        from llama_mcore.plan.layout_report import memory_json, show_memory
        from llama_mcore.plan.layout_run import base_run

        if bool(model) == bool(config):
            raise ConfigError(Problem("--model, --config", model or "(neither)", "give one of the two"))
        run, kind, _ = all_of(
            lambda: load_run(config) if config else base_run(model, seq_length),
            lambda: gpu_named(gpu) if gpu else None,
            lambda: _check_choices(recompute=(recompute, _RECOMPUTE), precision=(precision, _PRECISIONS)),
        )
        if config:
            ranks = world_size or run.parallel.tp
        else:
            run, ranks = _laid_out(run, tp, sp, dp, zero, micro_batch, recompute, precision), tp * dp
        check_run(run, ranks)
        found = memory_of(run, ranks)
        if json:
            fits = {} if kind is None else {"gpu": kind.name, "fits": found.total <= kind.memory_bytes}
            typer.echo(json_module.dumps(memory_json(found) | {"world_size": ranks} | fits, indent=2))
        else:
            show_memory(run, ranks, found, kind)


def layout(
    gpus: Annotated[int, typer.Option(min=1, help="How many GPUs.")],
    gpu: Annotated[str, typer.Option(help="a100-40gb, a100-80gb, h100, h200 or b200.")],
    tokens: Annotated[str, typer.Option(help="To train on, e.g. 1.4T or 300B.")],
    model: Model = "",
    num_layers: Annotated[
        int | None, typer.Option(min=1, help="With the next two: instead of --model.")
    ] = None,
    hidden_size: Annotated[int | None, typer.Option(min=1)] = None,
    num_attention_heads: Annotated[int | None, typer.Option(min=1)] = None,
    ffn_hidden_size: Annotated[
        int | None, typer.Option(min=1, help="Default: 8/3 of the width, in steps of 256.")
    ] = None,
    num_query_groups: Annotated[int | None, typer.Option(min=1, help="Default: the heads.")] = None,
    vocab_size: Annotated[int | None, typer.Option(min=2, help="Default: 32000.")] = None,
    network: Annotated[
        str,
        typer.Option(help="Between nodes, e.g. ib-200x8: 8 links of 200 Gbit/s; default: the GPU's usual."),
    ] = "",
    global_batch_tokens: Annotated[
        str, typer.Option(help="Tokens of a step; K and M are 1,024 and its square here.")
    ] = "4M",
    seq_length: SeqLength = None,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="GPUs that NVLink joins.")] = 8,
    top: Annotated[int, typer.Option(min=1, help="Layouts to show.")] = 10,
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
        from llama_mcore.plan.arguments import all_of
        from llama_mcore.plan.layout_report import found_json, show_layouts
        from llama_mcore.plan.layout_run import base_run, launch_command, write_run
        from llama_mcore.plan.search import nothing_fits, search, with_tokens
        from llama_mcore.units import format_count, parse_count

        if write_script and not write_config:
            raise ConfigError(Problem("--write-script", write_script, "needs --write-config", "add it"))
        shape = {
            "num_layers": num_layers,
            "hidden_size": hidden_size,
            "num_attention_heads": num_attention_heads,
            "ffn_hidden_size": ffn_hidden_size,
            "num_query_groups": num_query_groups,
            "vocab_size": vocab_size,
        }
        cluster, run, batch, count = all_of(
            lambda: _cluster(gpu, gpus, network, gpus_per_node, calibration),
            lambda: base_run(model, seq_length, shape),
            lambda: _batch_tokens(global_batch_tokens),
            lambda: parse_count("--tokens", tokens, 1, MOST_TOKENS),
        )
        wanted = with_tokens(run, count, batch, cluster)
        name = model or f"{format_count(run.model.num_params())} parameters"
        found = search(wanted, cluster)
        if not found.options:
            raise nothing_fits(wanted, cluster, found.rejected)
        if write_config:
            write_run(found.options[0], write_config, write_script, force=force)
        command = launch_command(found.options[0], write_config) if write_config else ""
        if json:
            written = {"config": str(write_config), "slurm_command": command} if write_config else {}
            if write_script:
                written["script"] = str(write_script)
            typer.echo(
                json_module.dumps(found_json(found, cluster, top) | {"model": name} | written, indent=2)
            )
            return
        show_layouts(name, found, cluster, top)
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
        from llama_mcore.plan import layout_report, validation
        from llama_mcore.plan.calibration import load_calibration
        from llama_mcore.plan.efficiency import Efficiency, dump_efficiency

        if fit:
            typer.echo(dump_efficiency(validation.fit()), nl=False)
            return
        rows = validation.validate(load_calibration(calibration) if calibration else Efficiency())
        if json:
            typer.echo(json_module.dumps(layout_report.validation_json(rows), indent=2))
        elif markdown:
            typer.echo(layout_report.validation_markdown(rows))
        else:
            layout_report.show_validation(rows)


_RECOMPUTE = ("none", "selective", "full")
_PRECISIONS = ("bf16", "fp32")
MOST_TOKENS = 1e18
_BINARY = {"": 1.0, "K": 2.0**10, "M": 2.0**20}


def _check_choices(**given: tuple[str, tuple[str, ...]]) -> None:
    problems = [
        Problem(f"--{name}", value, "is not known", f"known: {', '.join(known)}")
        for name, (value, known) in given.items()
        if value not in known
    ]
    if problems:
        raise ConfigError(problems)


def _laid_out(
    run: "RunConfig", tp: int, sp: bool, dp: int, stage: int, micro_batch: int, recompute: str, precision: str
) -> "RunConfig":
    """The run with one micro-batch a step: memory does not depend on how many there are."""
    sections = {
        "model": {"recompute": recompute},
        "parallel": {"tp": tp, "sequence_parallel": sp},
        "zero": {"stage": stage},
        "train": {
            "micro_batch_size": micro_batch,
            "global_batch_size": micro_batch * dp,
            "precision": precision,
        },
    }
    return run.model_copy(
        update={name: getattr(run, name).model_copy(update=fields) for name, fields in sections.items()}
    )


def _cluster(gpu: str, gpus: int, network: str, gpus_per_node: int, calibration: Path | None) -> "Cluster":
    from llama_mcore.plan import hardware
    from llama_mcore.plan.calibration import load_calibration
    from llama_mcore.plan.efficiency import Efficiency
    from llama_mcore.plan.search import Cluster

    kind = hardware.gpu(gpu)
    between = hardware.network(network or hardware.DEFAULT_NETWORK[kind.name])
    return Cluster(
        kind, gpus, between, load_calibration(calibration) if calibration else Efficiency(), gpus_per_node
    )


def _batch_tokens(text: str) -> float:
    """4M -> 4 * 2^20. ConfigError for what is no positive number."""
    unit = text[-1:].upper() if text[-1:].isalpha() else ""
    try:
        value = float(text[: len(text) - len(unit)]) * _BINARY[unit]
    except (ValueError, KeyError):
        value = 0.0
    if not 0 < value < MOST_TOKENS:
        bound = f"must be a number above 0 and below {MOST_TOKENS:g}"
        raise ConfigError(Problem("--global-batch-tokens", text, bound, "units: K, M"))
    return value
