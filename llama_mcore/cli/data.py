"""Commands on text and datasets: train-tokenizer, preprocess-data, merge-datasets, inspect-dataset."""

from pathlib import Path
from typing import Annotated

import typer

from llama_mcore.cli.options import Debug, Json, ManyValues, command_group
from llama_mcore.errors import report_errors

app = command_group()


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
        typer.Option(help="Refuse text that needs more memory, e.g. 60GB; default: 80 % of what is free."),
    ] = "",
    report: Annotated[
        bool, typer.Option("--report", help="Print how well it compresses each source.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing tokenizer.")] = False,
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
            "reads stdin cannot be resumed after it was killed."
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
        str,
        typer.Option(
            help="INDEX/COUNT, counted from 0: process only this part of the input, in a job array."
        ),
    ] = "0/1",
    shuffle_seed: Annotated[
        int | None, typer.Option(min=0, help="Shuffle documents inside each 4 to 64 MB of input.")
    ] = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Discard what an interrupted job has done.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace existing datasets.")] = False,
    tokenizer_type: Annotated[
        str, typer.Option(help="Megatron's name of the tokenizer; any that is SentencePiece is accepted.")
    ] = "",
    debug: Debug = False,
) -> None:
    """Tokenize text into megatron-core's .bin and .idx. The same command resumes after an interruption.

    Documents keep the order of the input, whatever the number of workers. Empty ones are left out.
    """
    with report_errors(debug):
        from llama_mcore.preprocess import preprocess

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
        typer.Option(help="Prefixes of datasets, in order, or a folder of datasets."),
    ],
    output_prefix: Annotated[
        Path, typer.Option(help="Prefix of the files to write: PREFIX.bin, .idx and .json.")
    ],
    force: Annotated[bool, typer.Option("--force", help="Replace an existing dataset.")] = False,
    debug: Debug = False,
) -> None:
    """Join datasets made with one tokenizer, such as the shards of a job array, into one."""
    with report_errors(debug):
        from llama_mcore.preprocess.merge import merge_datasets

        merge_datasets(input, output_prefix, force=force)


@app.command("inspect-dataset")
def inspect_dataset(
    prefix: Annotated[str, typer.Argument(help="Prefix of the dataset: PREFIX.bin and PREFIX.idx.")],
    verify: Annotated[bool, typer.Option("--verify", help="Read and check every byte.")] = False,
    show: Annotated[int, typer.Option(min=0, help="How many documents to print.")] = 0,
    start: Annotated[int, typer.Option(min=0, help="First document to print.")] = 0,
    tokenizer_model: Annotated[
        Path | None, typer.Option(help="SentencePiece model, to show text instead of ids.")
    ] = None,
    write_manifest: Annotated[
        bool,
        typer.Option("--write-manifest", help="Write PREFIX.json for a dataset that another tool made."),
    ] = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Print what a dataset holds; check that it is complete."""
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
