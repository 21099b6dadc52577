"""Commands on checkpoints: convert, inspect, compare, generate."""

from pathlib import Path
from typing import Annotated

import typer

from llama_mcore.cli.options import Debug, Json, NamedModel, SourceFormat, command_group
from llama_mcore.errors import report_errors

app = command_group()


@app.command("convert")
def convert(
    input: Annotated[Path, typer.Option(help="Checkpoint to read; of a run's folder its newest.")],
    output: Annotated[Path, typer.Option(help="Folder to write.")],
    target: Annotated[str, typer.Option("--to", help="native, hf, meta, megatron or deepspeed (universal).")],
    source: SourceFormat = None,
    tp: Annotated[
        int | None,
        typer.Option(help="Tensor-parallel ranks to split the files for: native, meta, deepspeed."),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="bf16, fp16 or fp32; default: as the input, of a training run bf16."),
    ] = None,
    max_shard_size: Annotated[
        str, typer.Option(help="Largest file to write for hf, e.g. 500MB or 5GB.")
    ] = "5GB",
    optimizer: Annotated[
        bool, typer.Option("--optimizer", help="Include fp32 master weights and Adam moments.")
    ] = False,
    model: NamedModel = None,
    verify: Annotated[bool, typer.Option(help="Read the output back and compare.")] = True,
    device: Annotated[
        str, typer.Option(help="Device on which the proof computes logits: cpu, auto for the same, or cuda.")
    ] = "auto",
    force: Annotated[
        bool, typer.Option("--force", help="Replace the output, if convert has written all of it.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Convert a checkpoint to another format and verify the result."""
    with report_errors(debug):
        from llama_mcore.api import convert_checkpoint

        convert_checkpoint(
            input,
            output,
            to=target,
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
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Print what checkpoints hold; check that they are complete; compare two."""
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
    model: NamedModel = None,
    json: Json = False,
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
    source: SourceFormat = None,
    model: NamedModel = None,
    device: Annotated[str, typer.Option(help="auto: a GPU where there is one; cpu; or cuda.")] = "auto",
    debug: Debug = False,
) -> None:
    """Continue a text with a trained checkpoint."""
    with report_errors(debug):
        from llama_mcore.api import generate_text

        typer.echo(
            generate_text(
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
