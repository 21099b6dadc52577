"""The `llama-mcore` command. Each script in tools/ is one of its sub-commands under Megatron's name.

Commands import what they need when they run: `--help` and `--dry-run` load no torch.
"""

import llama_mcore.installed  # noqa: F401

# isort: split
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from llama_mcore import __version__
from llama_mcore.cli.plan import app as plan_app
from llama_mcore.errors import leave, report_errors

app = typer.Typer(
    name="llama-mcore",
    help="Pre-train LLaMA with megatron-core layers and DeepSpeed ZeRO.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

app.add_typer(plan_app)

NAMED_MODEL = "Preset, run YAML or config.json, for a checkpoint that does not say what model it holds."
Debug = Annotated[bool, typer.Option("--debug", help="Print a traceback with an error.")]


class ManyValues(TyperCommand):
    """Takes `--input a b` for `--input a --input b`, as argparse's nargs="+" does in Megatron's tools."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        many = {name for option in self.params if getattr(option, "multiple", False) for name in option.opts}
        repeated: list[str] = []
        flag = ""
        for argument in args:
            if argument.startswith("-") and argument != "-":
                flag = argument if argument in many else ""
            elif flag and repeated[-1] != flag:
                repeated.append(flag)
            repeated.append(argument)
        return super().parse_args(ctx, repeated)


def main(command: str | None = None) -> None:
    """Entry point: the whole command line, or one sub-command for the script of that name in tools/."""
    root = typer.main.get_command(app)
    if command is None:
        root()
    elif isinstance(root, typer.core.TyperGroup):
        root.commands[command]()  # not by way of the root, whose name usage lines would have twice


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        typer.echo(__version__)


@app.command("train-tokenizer")
def train_tokenizer(
    input: Annotated[
        list[str],
        typer.Option(
            help="[NAME=]PATH: a file, folder or pattern of JSONL, Parquet or text; repeat for several.",
            metavar="[NAME=]PATH",
        ),
    ],
    output: Annotated[Path, typer.Option(help="The model to write, e.g. tokenizer/tokenizer.model.")],
    vocab_size: Annotated[int, typer.Option(help="Tokens in the vocabulary.")] = 32000,
    json_key: Annotated[str, typer.Option(help="Key of the text in each document.")] = "text",
    bytes_per_source: Annotated[
        str, typer.Option(help="Learn from a random sample of this size of each source, e.g. 500MB.")
    ] = "",
    seed: Annotated[int, typer.Option(help="Seed of that sample.")] = 0,
    max_memory: Annotated[
        str,
        typer.Option(help="Refuse text that needs more memory, e.g. 60GB; default: 80 % of the free."),
    ] = "",
    report: Annotated[
        bool, typer.Option("--report", help="Print how well it compresses each source.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace another tokenizer of that name, or make it again.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Train a SentencePiece BPE tokenizer with LLaMA's settings."""
    with report_errors(debug):
        from llama_mcore.tokenizer.train import train_tokenizer
        from llama_mcore.units import parse_bytes

        budget = parse_bytes("--bytes-per-source", bytes_per_source) if bytes_per_source else None
        limit = parse_bytes("--max-memory", max_memory) if max_memory else None
        train_tokenizer(
            input,
            output,
            vocab_size=vocab_size,
            json_key=json_key,
            bytes_per_source=budget,
            seed=seed,
            max_memory=limit,
            report=report,
            force=force,
        )


@app.command("preprocess-data", cls=ManyValues)
def preprocess_data(
    input: Annotated[
        list[str],
        typer.Option(
            help="Files, folders or patterns, one or several: .jsonl and .json (an object a line), both also "
            ".gz and .zst, .parquet, .txt (one document a file). `-` reads JSONL from stdin; a job that "
            "reads stdin cannot go on after it was killed."
        ),
    ],
    tokenizer_model: Annotated[Path, typer.Option(help="SentencePiece model.")],
    output_prefix: Annotated[
        Path, typer.Option(help="Prefix of the files to write: PREFIX_KEY_document.bin, .idx, .json.")
    ],
    json_keys: Annotated[list[str], typer.Option(help="Keys of the text, one or several.")] = ["text"],  # noqa: B006
    workers: Annotated[int, typer.Option(min=1, help="Processes that tokenize.")] = 1,
    append_eod: Annotated[bool, typer.Option("--append-eod", help="End each document with EOS.")] = False,
    append_bos: Annotated[
        bool,
        typer.Option("--append-bos", help="Begin each document with BOS, as Megatron's Llama2Tokenizer did."),
    ] = False,
    encoder: Annotated[
        str, typer.Option(help="gigatoken; or sentencepiece, which is slower and gives the same tokens.")
    ] = "gigatoken",
    on_bad_line: Annotated[
        str, typer.Option(help="fail; or skip, which lists bad lines in PREFIX.quarantine.jsonl.")
    ] = "fail",
    max_bad_ratio: Annotated[float, typer.Option(help="Share of documents that may be skipped.")] = 0.01,
    validation_split: Annotated[
        float,
        typer.Option(help="Share of documents, by their hash, to write to PREFIX_KEY_validation instead."),
    ] = 0.0,
    shard: Annotated[
        str, typer.Option(help="INDEX/COUNT, counted from 0: do only this part of the input, in a job array.")
    ] = "0/1",
    shuffle_seed: Annotated[
        int | None, typer.Option(min=0, help="Shuffle documents inside each 4 to 64 MB of input.")
    ] = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Drop what an interrupted job has done.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace other datasets of that name, or make them again.")
    ] = False,
    tokenizer_type: Annotated[
        str, typer.Option(help="Megatron's name of the tokenizer: any SentencePiece one.")
    ] = "",
    log_interval: Annotated[int, typer.Option(hidden=True, help="Megatron's; without effect.")] = 0,
    keep_sequential_samples: Annotated[bool, typer.Option("--keep-sequential-samples", hidden=True)] = False,
    partitions: Annotated[int, typer.Option(hidden=True, help="Megatron's; without effect.")] = 1,
    debug: Debug = False,
) -> None:
    """Tokenize text into megatron-core's .bin and .idx. The same command goes on after an interruption.

    Documents keep the order of the input, whatever the number of workers. Those without text are left out.
    """
    with report_errors(debug):
        from llama_mcore.preprocess.preprocess import preprocess

        preprocess(
            input,
            tokenizer_model,
            output_prefix,
            json_keys=json_keys,
            workers=workers,
            append_eod=append_eod,
            append_bos=append_bos,
            encoder=encoder,
            on_bad_line=on_bad_line,
            max_bad_ratio=max_bad_ratio,
            validation_split=validation_split,
            shard=shard,
            shuffle_seed=shuffle_seed,
            restart=restart,
            force=force,
            tokenizer_type=tokenizer_type,
        )


@app.command("merge-datasets", cls=ManyValues)
def merge_datasets(
    input: Annotated[
        list[str],
        typer.Option(help="Prefixes of datasets in their order, or a folder of datasets."),
    ],
    output_prefix: Annotated[
        Path, typer.Option(help="Prefix of the files to write: PREFIX.bin, .idx and .json.")
    ],
    force: Annotated[
        bool, typer.Option("--force", help="Replace another dataset of that name, or make it again.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Join datasets made with one tokenizer, such as the shards of a job array, into one."""
    with report_errors(debug):
        from llama_mcore.preprocess.merge import merge_datasets

        merge_datasets(input, output_prefix, force=force)


@app.command("inspect-dataset")
def inspect_dataset(
    prefix: Annotated[str, typer.Argument(help="Prefix of the dataset: of PREFIX.bin and PREFIX.idx.")],
    verify: Annotated[bool, typer.Option("--verify", help="Read and check every byte.")] = False,
    show: Annotated[int, typer.Option(min=0, help="How many documents to print.")] = 0,
    start: Annotated[int, typer.Option(min=0, help="First document to print.")] = 0,
    tokenizer_model: Annotated[
        Path | None, typer.Option(help="SentencePiece model, to show text instead of ids.")
    ] = None,
    write_manifest: Annotated[
        bool,
        typer.Option("--write-manifest", help="Write PREFIX.json for a dataset of another tool."),
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    debug: Debug = False,
) -> None:
    """Print what a dataset holds; check that it is whole."""
    with report_errors(debug):
        from llama_mcore.data.inspect import inspect_dataset

        inspect_dataset(
            prefix,
            verify=verify,
            show=show,
            start=start,
            tokenizer_model=tokenizer_model,
            add_manifest=write_manifest,
            as_json=json,
        )


@app.command("goodput")
def goodput(
    run_dir: Annotated[Path, typer.Argument(help="Folder of the run.")],
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    picture: Annotated[Path | None, typer.Option(help="Also draw it to this PNG.")] = None,
    debug: Debug = False,
) -> None:
    """Say where the time of a run went: steps, lost steps, saving, evaluation, restarting, waiting."""
    with report_errors(debug):
        from llama_mcore.observe.goodput.report import show_goodput

        show_goodput(run_dir, as_json=json, picture=picture)


@app.command("audit-data")
def audit_data(
    run_dir: Annotated[Path, typer.Argument(help="Folder of the run.")],
    debug: Debug = False,
) -> None:
    """Prove from plan and ledger how often a run has read every window."""
    with report_errors(debug):
        from llama_mcore.checkpoint.audit import audit_run

        typer.echo(audit_run(run_dir))


@app.command(
    "train",
    context_settings={"allow_extra_args": True},
    options_metavar="--config NAME [section.key=value ...]",
)
def train(
    context: typer.Context,
    config: Annotated[str, typer.Option(help="YAML file, or a shipped one: tiny, 7b, 13b, 33b, 65b.")],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check and print the plan; start nothing.")
    ] = False,
    world_size: Annotated[
        int | None, typer.Option(help="With --dry-run: ranks to plan for; default: parallel.tp.")
    ] = None,
    resume: Annotated[
        str,
        typer.Option(
            help="auto: from the newest checkpoint; never; or the folder of an older one of this run, to go "
            "back to it."
        ),
    ] = "auto",
    init_from: Annotated[
        str, typer.Option(help="Checkpoint, or run folder, whose weights a new run begins with.")
    ] = "",
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
    local_rank: Annotated[int, typer.Option("--local_rank", hidden=True, help="Set by deepspeed.")] = 0,
    debug: Debug = False,
) -> None:
    """Train, or resume, the run that a configuration describes. Start it with torchrun, srun or deepspeed."""
    from llama_mcore.watchdog.signals import held_stop_signals

    with held_stop_signals(), report_errors(debug):
        from llama_mcore.distributed.launch_env import rank_from_environment

        place = rank_from_environment()
        from llama_mcore.checkpoint.start import Start
        from llama_mcore.cli import start_run
        from llama_mcore.config.checks import check_config
        from llama_mcore.config.load import load_config

        start = Start(resume, init_from, fresh, accept_data_change)
        if world_size is not None:
            start_run.check_world_size(world_size, dry_run)
        run = load_config(config, context.args)
        ranks = place.world_size
        if dry_run and (world_size or place.is_single_process):
            ranks = world_size or run.parallel.tp
        check_config(run, ranks)
        if not dry_run:
            start_run.check_attempts(run, retry or fresh)
            leave(start_run.train_watched(run, start))
        from llama_mcore.train.ds_config import deepspeed_config

        deepspeed_config(run, ranks)
        if place.is_single_process or world_size:
            start_run.print_plan(run, ranks, start)
        else:
            start_run.preflight_run(run, place, start, json=False, retry=retry or fresh)


@app.command(
    "preflight",
    context_settings={"allow_extra_args": True},
    options_metavar="--config NAME [section.key=value ...]",
)
def preflight(
    context: typer.Context,
    config: Annotated[str, typer.Option(help="YAML file, or a shipped one: tiny, 7b, 13b, 33b, 65b.")],
    init_from: Annotated[
        str, typer.Option(help="Checkpoint, or run folder, whose weights a new run begins with.")
    ] = "",
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    local_rank: Annotated[int, typer.Option("--local_rank", hidden=True, help="Set by deepspeed.")] = 0,
    debug: Debug = False,
) -> None:
    """Check from every rank what would stop a run: data, folder, room, memory, network, clocks, versions.

    Start it as the run would be started; train --dry-run does the same under a launcher."""
    with report_errors(debug):
        from llama_mcore.distributed.launch_env import rank_from_environment

        place = rank_from_environment()
        from llama_mcore.checkpoint.start import Start
        from llama_mcore.cli import start_run
        from llama_mcore.config.checks import check_config
        from llama_mcore.config.load import load_config
        from llama_mcore.train.ds_config import deepspeed_config

        run = load_config(config, context.args)
        check_config(run, place.world_size)
        deepspeed_config(run, place.world_size)
        start_run.preflight_run(run, place, Start(init_from=init_from), json=json)


@app.command("convert")
def convert(
    input: Annotated[Path, typer.Option(help="Checkpoint to read; of a run's folder its newest.")],
    output: Annotated[Path, typer.Option(help="Folder to write.")],
    target: Annotated[str, typer.Option("--to", help="native, hf, meta, megatron or deepspeed (universal).")],
    source: Annotated[
        str | None, typer.Option("--from", help="Format of the input; default: what it looks like.")
    ] = None,
    tp: Annotated[
        int | None, typer.Option(help="Tensor-parallel ranks to cut the files for: native, meta, deepspeed.")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="bf16, fp16 or fp32; default: as the input, of a training run bf16."),
    ] = None,
    max_shard_size: Annotated[
        str, typer.Option(help="Largest file to write for hf, e.g. 500MB or 5GB.")
    ] = "5GB",
    optimizer: Annotated[
        bool, typer.Option("--optimizer", help="Carry fp32 masters and Adam moments too.")
    ] = False,
    model: Annotated[
        str | None,
        typer.Option(help=NAMED_MODEL),
    ] = None,
    verify: Annotated[bool, typer.Option(help="Read the output back and compare.")] = True,
    device: Annotated[
        str, typer.Option(help="Where the proof computes logits: cpu, auto for the same, or cuda.")
    ] = "auto",
    force: Annotated[
        bool, typer.Option("--force", help="Replace the output, where convert has written all of it.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Convert a checkpoint to another format and verify the result."""
    with report_errors(debug):
        from llama_mcore.convert.convert import convert

        convert(
            input,
            output,
            target=target,
            source=source,
            tp=tp,
            dtype=dtype,
            max_shard_size=max_shard_size,
            verify=verify,
            optimizer=optimizer,
            model=model,
            device=device,
            force=force,
        )


@app.command("inspect-checkpoint")
def inspect_checkpoint(
    folder: Annotated[Path, typer.Argument(help="Folder of a run, or of one checkpoint.")],
    verify: Annotated[bool, typer.Option("--verify", help="Read and check every byte.")] = False,
    diff: Annotated[
        Path | None,
        typer.Option(help="Compare with this one; exit code 1 if they differ."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    debug: Debug = False,
) -> None:
    """Print what checkpoints hold; check that they are whole; compare two."""
    with report_errors(debug):
        from llama_mcore.checkpoint.inspect import diff_checkpoints, inspect_checkpoint
        from llama_mcore.convert.registry import check_native

        if diff is None:
            check_native(
                folder, "compare-checkpoints and generate read it, convert makes any other format of it"
            )
            inspect_checkpoint(folder, verify=verify, as_json=json)
            return
        for path in (folder, diff):
            check_native(path, "compare-checkpoints compares it with one of any format")
        if not diff_checkpoints(folder, diff, verify=verify, as_json=json):
            raise typer.Exit(1)


@app.command("compare-checkpoints")
def compare_checkpoints(
    left: Annotated[Path, typer.Argument(help="A checkpoint of any format.")],
    right: Annotated[Path, typer.Argument(help="Another checkpoint, of any format.")],
    source: Annotated[
        str | None, typer.Option("--from", help="Format of the first; default: what it looks like.")
    ] = None,
    model: Annotated[str | None, typer.Option(help=NAMED_MODEL)] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    debug: Debug = False,
) -> None:
    """Compare two checkpoints of any formats: the first difference and its likely cause; exit code 1."""
    with report_errors(debug):
        from llama_mcore.convert.diagnose import compare_checkpoints

        if not compare_checkpoints(left, right, model=model, source=source, as_json=json):
            raise typer.Exit(1)


@app.command("generate")
def generate(
    checkpoint: Annotated[Path, typer.Option(help="Run folder, or checkpoint of any format.")],
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    tokenizer_model: Annotated[
        Path | None, typer.Option(help="SentencePiece model; default: the run's.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to write at most.")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 picks the likeliest token.")] = 0.8,
    top_p: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Draw from the likeliest tokens with this probability.")
    ] = 0.95,
    seed: Annotated[int, typer.Option(help="Seed of the draws.")] = 0,
    source: Annotated[
        str | None, typer.Option("--from", help="Format of the checkpoint; default: what it looks like.")
    ] = None,
    model: Annotated[str | None, typer.Option(help=NAMED_MODEL)] = None,
    device: Annotated[str, typer.Option(help="auto: a GPU where there is one; cpu; or cuda.")] = "auto",
    debug: Debug = False,
) -> None:
    """Continue a text with a trained checkpoint."""
    with report_errors(debug):
        from llama_mcore.distributed.device import choose_device, on_gpu
        from llama_mcore.observe.log import silence_libraries

        choose_device(device, field="--device")
        silence_libraries(cpu=not on_gpu())
        from llama_mcore.generate.generate import generate

        typer.echo(
            generate(
                checkpoint,
                prompt,
                tokenizer_model=tokenizer_model,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_p=top_p,
                seed=seed,
                source=source,
                model=model,
                device=device,
            )
        )


@app.command("doctor")
def doctor(
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    debug: Debug = False,
) -> None:
    """Say what is installed here, what is missing, what that costs and how to get it; exit code 69 where a
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
    config: Annotated[str, typer.Option(help="YAML file, or a shipped one: tiny, 7b, 13b, 33b, 65b.")],
    nodes: Annotated[int, typer.Option(help="Nodes of the job.")],
    gpus_per_node: Annotated[int, typer.Option(help="Also the ranks on each.")] = 8,
    time: Annotated[str, typer.Option(help="Limit, as sbatch takes it.")] = "24:00:00",
    signal_seconds: Annotated[
        int, typer.Option(help="So long before the limit the run saves and goes back into the queue.")
    ] = 180,
    job_name: Annotated[str | None, typer.Option(help="Default: the name of the run's folder.")] = None,
    partition: Annotated[str | None, typer.Option(help="Default: the site's.")] = None,
    account: Annotated[str | None, typer.Option(help="Default: the site's.")] = None,
    qos: Annotated[str | None, typer.Option(help="Default: the site's.")] = None,
    data_later: Annotated[
        bool, typer.Option("--data-later", help="Write it before the data is there: only the job looks.")
    ] = False,
    output: Annotated[Path | None, typer.Option(help="Script to write; default: print it.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a script that is there.")] = False,
    debug: Debug = False,
) -> None:
    """Write the sbatch script of a run, like those in slurm/, once all that needs no GPU is checked."""
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
    """torchrun, passing signals to the workers and their exit code on."""
    from llama_mcore.watchdog.signals import held_stop_signals

    with held_stop_signals():
        from llama_mcore.launch.torchrun import run

        leave(run(context.args))
