"""Commands of `llama-mcore benchmark`."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llama_mcore.cli.options import Debug, command_group
from llama_mcore.errors import report_errors

if TYPE_CHECKING:
    from llama_mcore.benchmark.runner import Bar, Result

app = command_group(
    "benchmark",
    "Measure this product. docs/benchmarks.md says what is compared, how, and what was found.",
)
Json = Annotated[Path | None, typer.Option("--json", help="Also write the result to this file.")]
Check = Annotated[bool, typer.Option("--check", help="Exit with 1 if a stated bar is missed.")]
Dimension = Annotated[int | None, typer.Option(min=1, help="Replaces the model's own.")]


@app.command("step")
def step(
    model: Annotated[str | None, typer.Option(help="Preset, e.g. 7b; without it 58M parameters.")] = None,
    num_layers: Dimension = None,
    hidden_size: Dimension = None,
    num_attention_heads: Dimension = None,
    num_query_groups: Dimension = None,
    head_dim: Dimension = None,
    ffn_hidden_size: Dimension = None,
    vocab_size: Dimension = None,
    seq_length: Dimension = None,
    micro_batch_size: Annotated[int | None, typer.Option(min=1, help="Sequences; default 4.")] = None,
    accumulation: Annotated[int, typer.Option(min=1, help="Micro-batches of a full step.")] = 1,
    recompute: Annotated[
        str | None, typer.Option(help="Recomputation of our layer: none, selective or full.")
    ] = None,
    attention: Annotated[str | None, typer.Option(help="Attention of our layer: cudnn, flash ...")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of each contender.")] = 7,
    repeats: Annotated[int, typer.Option(min=1, help="Timed passes in one round.")] = 2,
    contender: Annotated[
        list[str] | None,
        typer.Option(
            help="Only this one; repeat for several: ours, mcore, mcore-te, huggingface, "
            "huggingface-compiled, torchtitan-recipe, liger. Default: all on a GPU, the quick ones on a CPU."
        ),
    ] = None,
    before: Annotated[
        Path | None,
        typer.Option(help="Folder of another checkout: measure ours beside ours as it is there."),
    ] = None,
    json: Json = None,
    check: Check = False,
    debug: Debug = False,
) -> None:
    """Measure a training step beside megatron-core, Hugging Face and others' recipes: time, memory, MFU."""
    fields = {
        "num_layers": num_layers,
        "hidden_size": hidden_size,
        "num_attention_heads": num_attention_heads,
        "num_query_groups": num_query_groups,
        "head_dim": head_dim,
        "ffn_hidden_size": ffn_hidden_size,
        "vocab_size": vocab_size,
        "seq_length": seq_length,
        "recompute": recompute,
        "attention": attention,
    }
    with report_errors(debug):
        _prepare()
        from llama_mcore.benchmark.step import measure, request, stated_bars

        others = (contender, accumulation, before and before.resolve())
        asked = request(model, fields, micro_batch_size, rounds, repeats, *others)
        code = _run("step", lambda: measure(asked), stated_bars(asked), json, check)
    raise typer.Exit(code)


@app.command("loss")
def loss(
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of each.")] = 7,
    json: Json = None,
    check: Check = False,
    debug: Debug = False,
) -> None:
    """Measure output layer and cross-entropy beside the three matrix products in them."""
    with report_errors(debug):
        _prepare()
        from llama_mcore.benchmark.loss import default_run, measure, stated_bars

        code = _run("loss", lambda: measure(default_run(), rounds), stated_bars(), json, check)
    raise typer.Exit(code)


@app.command("activation-memory")
def activation_memory(json: Json = None, check: Check = False, debug: Debug = False) -> None:
    """Measure the bytes that one layer keeps for its backward under each recompute policy."""
    with report_errors(debug):
        _prepare()
        from llama_mcore.benchmark.activation_memory import BARS, SHAPE, measure

        code = _run("activation-memory", lambda: measure(SHAPE), BARS, json, check)
    raise typer.Exit(code)


@app.command("preprocess")
def preprocess(
    megabytes: Annotated[int, typer.Option(min=1, help="Size of the corpus.")] = 1000,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of each contender.")] = 3,
    json: Json = None,
    check: Check = False,
    debug: Debug = False,
) -> None:
    """Measure preprocessing beside the same with sentencepiece and the bare encoder: MB/s, memory."""
    with report_errors(debug):
        _prepare()
        from llama_mcore.benchmark.preprocess import BARS, measure

        code = _run("preprocess", lambda: measure(megabytes, rounds), BARS, json, check)
    raise typer.Exit(code)


@app.command("loader")
def loader(json: Json = None, check: Check = False, debug: Debug = False) -> None:
    """Measure the tokens/s that one process reads, and how fast the order of 1.4T tokens starts."""
    with report_errors(debug):
        _prepare()
        from llama_mcore.benchmark.loader import BARS, measure

        code = _run("loader", measure, BARS, json, check)
    raise typer.Exit(code)


@app.command("checkpoint")
def checkpoint(
    folder: Annotated[
        Path | None, typer.Option(help="Folder on the disk to measure; default: that of temporary files.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of each measurement.")] = 5,
    json: Json = None,
    check: Check = False,
    debug: Debug = False,
) -> None:
    """Measure saves during training and without: stall, write speed with hashing, verification, loading."""
    with report_errors(debug):
        _prepare()
        from llama_mcore.benchmark.checkpoint import BARS, measure

        code = _run("checkpoint", lambda: measure(rounds, folder), BARS, json, check)
    raise typer.Exit(code)


@app.command("convert")
def convert(
    folder: Annotated[
        Path | None, typer.Option(help="Folder on the disk to measure; default: that of temporary files.")
    ] = None,
    layers: Annotated[
        int, typer.Option(min=1, help="Layers of the model, of about 100 MB each in bf16.")
    ] = 16,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of each conversion.")] = 3,
    json: Json = None,
    check: Check = False,
    debug: Debug = False,
) -> None:
    """Measure conversions between formats beside cp of the same bytes: speed, memory."""
    with report_errors(debug):
        _prepare()
        from llama_mcore.benchmark.convert import BARS, measure

        code = _run("convert", lambda: measure(layers, rounds, folder), BARS, json, check)
    raise typer.Exit(code)


def _run(
    name: str, measure: Callable[[], "Result"], bars: Sequence["Bar"], json: Path | None, check: bool
) -> int:
    from llama_mcore.benchmark.runner import check_request, finish, use_all_cores

    check_request(name, bars, json, check)
    use_all_cores()
    return finish(measure(), json, check)


def _prepare() -> None:
    """Choose the device and silence the libraries, before megatron-core and DeepSpeed are imported."""
    from llama_mcore.api import prepare_process
    from llama_mcore.observe.log import setup_logging

    setup_logging(rank=0)
    prepare_process()
