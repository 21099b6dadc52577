"""The commands of `llama-mcore plan`. Each imports what it needs when it runs; none loads torch.

Numbers are text here, so that 1.4T is one, and what is none ends with the same exit code as any other wrong
argument, all of them in one message.
"""

from pathlib import Path
from typing import Annotated

import typer

from llama_mcore.cli.as_json import print_json
from llama_mcore.cli.plan_layout import add_commands
from llama_mcore.errors import report_errors
from llama_mcore.plan.layout.hardware import GPUS

app = typer.Typer(
    name="plan",
    help="What to train, on how many tokens, and on which layout: answered before a GPU is taken.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON; docs/planner.md has its keys.")]
Debug = Annotated[bool, typer.Option("--debug", help="Print a traceback with an error.")]


@app.callback()
def _root() -> None:
    """Keeps the sub-command an argument however many there are."""


@app.command("size")
def size(
    flops: Annotated[str, typer.Option(help="Training budget, e.g. 5.6e23.")] = "",
    gpus: Annotated[str, typer.Option(help="With --days: the training budget instead of --flops.")] = "",
    gpu: Annotated[str, typer.Option(help=f"One of {', '.join(GPUS)}.")] = "a100-80gb",
    days: Annotated[str, typer.Option(help="With --gpus: days for which all of them train.")] = "",
    mfu: Annotated[
        str,
        typer.Option(
            help="Share of the GPU's peak, 6 N operations a token; default: with --gpus what the fastest "
            "layout is predicted to reach, else 0.4."
        ),
    ] = "",
    inference_tokens: Annotated[
        str, typer.Option(help="Tokens read and written over the model's life, e.g. 10T.")
    ] = "0",
    loss: Annotated[str, typer.Option(help="Quality to reach, in nats a token by the law.")] = "",
    law: Annotated[
        str, typer.Option(help="epoch, or Hoffmann's own: hoffmann-3 or hoffmann-3-unrounded.")
    ] = "epoch",
    picture: Annotated[
        Path | None, typer.Option(help="Also draw loss against lifetime cost to this new PNG.")
    ] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """What should I train: how many parameters on how many tokens, for a budget, an expected amount of
    inference and optionally a loss; and where LLaMA stands."""
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
            print_json(size_dict(plan, how))
        else:
            from llama_mcore.plan.table import show

            show(size_parts(plan, how))


@app.command("data")
def data(
    tokens: Annotated[str, typer.Option(help="Tokens that the run reads, e.g. 1.4T.")],
    mixture: Annotated[str, typer.Option(help="A mixture's file, or a shipped one.")] = "mixture_llama1",
    tokens_available: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=TOKENS", help="Tokens a source has, if not those of the paper's Table 1."),
    ] = None,
    max_epochs: Annotated[str, typer.Option(help="A source read more often is short.")] = "4",
    preprocess_mb_per_s: Annotated[str, typer.Option(help="Text that one core tokenizes.")] = "30",
    cores: Annotated[str, typer.Option(help="Cores that preprocess.")] = "1",
    json: Json = False,
    debug: Debug = False,
) -> None:
    """What a mixture must hold for a number of tokens: epochs of each source, what is short, disk, time."""
    with report_errors(debug):
        from llama_mcore.plan.data import plan_data

        plan = plan_data(tokens, mixture, tokens_available or (), max_epochs, preprocess_mb_per_s, cores)
        if json:
            print_json(plan.to_dict())
        else:
            from llama_mcore.plan.table import show

            show(plan.parts())


add_commands(app)
