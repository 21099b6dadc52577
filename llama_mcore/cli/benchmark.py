"""The commands of tools/benchmark.py. Each imports what it needs when it runs."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llama_mcore.errors import report_errors

if TYPE_CHECKING:
    from llama_mcore.benchmark.runner import Bar, Result

app = typer.Typer(
    name="benchmark",
    help="Measure this product. docs/benchmarks.md says what is compared, how, and what was found.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Json = Annotated[Path | None, typer.Option("--json", help="Also write the result to this file.")]
Check = Annotated[bool, typer.Option("--check", help="Exit 1 when a stated bar is not held.")]
Debug = Annotated[bool, typer.Option("--debug", help="Print a traceback with an error.")]
Dimension = Annotated[int | None, typer.Option(min=1, help="In place of what the model has.")]


@app.callback()
def _root() -> None:
    """Keeps NAME an argument however many benchmarks there are."""


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
    recompute: Annotated[
        str | None, typer.Option(help="Recomputation of our layer: none, selective or full.")
    ] = None,
    attention: Annotated[str | None, typer.Option(help="Attention of our layer: cudnn, flash ...")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each contender.")] = 5,
    repeats: Annotated[int, typer.Option(min=1, help="Timed passes in one turn.")] = 2,
    contender: Annotated[
        list[str] | None, typer.Option(help="Only this one; repeat for several: ours, mcore, huggingface.")
    ] = None,
    json: Json = None,
    check: Check = False,
    debug: Debug = False,
) -> None:
    """A training step beside megatron-core's own layers and Hugging Face: time, memory, MFU."""
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
        _silence()
        from llama_mcore.benchmark.step import measure, request, stated_bars

        asked = request(model, fields, micro_batch_size, rounds, repeats, contender)
        code = _run("step", lambda: measure(asked), stated_bars(asked), json, check)
    raise typer.Exit(code)


@app.command("activation-memory")
def activation_memory(json: Json = None, check: Check = False, debug: Debug = False) -> None:
    """Bytes that one layer keeps for its backward under each recompute policy."""
    with report_errors(debug):
        _silence()
        from llama_mcore.benchmark.activation_memory import BARS, SHAPE, measure

        code = _run("activation-memory", lambda: measure(SHAPE), BARS, json, check)
    raise typer.Exit(code)


@app.command("preprocess")
def preprocess(
    megabytes: Annotated[int, typer.Option(min=1, help="Size of the corpus.")] = 1000,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each contender.")] = 3,
    json: Json = None,
    check: Check = False,
    debug: Debug = False,
) -> None:
    """tools/preprocess_data.py beside itself with sentencepiece and the bare encoder: MB/s, memory."""
    with report_errors(debug):
        _silence()
        from llama_mcore.benchmark.preprocess import BARS, measure

        code = _run("preprocess", lambda: measure(megabytes, rounds), BARS, json, check)
    raise typer.Exit(code)


@app.command("loader")
def loader(json: Json = None, check: Check = False, debug: Debug = False) -> None:
    """Tokens/s that one process reads, and how fast the order of 1.4T tokens starts."""
    with report_errors(debug):
        _silence()
        from llama_mcore.benchmark.loader import BARS, measure

        code = _run("loader", measure, BARS, json, check)
    raise typer.Exit(code)


@app.command("checkpoint")
def checkpoint(
    folder: Annotated[
        Path | None, typer.Option(help="On the disk to measure; default: that of temporary files.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each thing that is measured.")] = 5,
    json: Json = None,
    check: Check = False,
    debug: Debug = False,
) -> None:
    """Saves beside training and without: stall, write speed with hashing, verification, loading."""
    with report_errors(debug):
        _silence()
        from llama_mcore.benchmark.checkpoint import BARS, measure

        code = _run("checkpoint", lambda: measure(rounds, folder), BARS, json, check)
    raise typer.Exit(code)


@app.command("convert")
def convert(
    folder: Annotated[
        Path | None, typer.Option(help="On the disk to measure; default: that of temporary files.")
    ] = None,
    layers: Annotated[
        int, typer.Option(min=1, help="Layers of the model, of about 100 MB each in bf16.")
    ] = 16,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each conversion.")] = 3,
    json: Json = None,
    check: Check = False,
    debug: Debug = False,
) -> None:
    """Conversions between formats beside cp of the same bytes: speed, memory."""
    with report_errors(debug):
        _silence()
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


def _silence() -> None:
    """Before megatron-core and DeepSpeed are imported."""
    from llama_mcore.distributed.device import choose_device, on_gpu
    from llama_mcore.observe.log import setup_logging, silence_libraries

    choose_device()
    setup_logging(rank=0)
    silence_libraries(cpu=not on_gpu())
