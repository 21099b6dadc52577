"""The `llama-mcore` command: all groups of commands under one name."""

import llama_mcore.installed  # noqa: F401

# isort: split
from typing import Annotated

import typer

from llama_mcore import __version__
from llama_mcore.cli import benchmark, checkpoint, data, launch, plan, train
from llama_mcore.cli.options import command_group

app = command_group("llama-mcore", "Pre-train LLaMA with megatron-core layers and DeepSpeed ZeRO.")
for part in (data, train, launch, checkpoint, plan, benchmark):
    app.add_typer(part.app)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        typer.echo(__version__)


def main(command: str | None = None) -> None:
    """Run the whole command line, or one command for the script of that name in tools/."""
    root = typer.main.get_command(app)
    if command is None:
        root()
    elif isinstance(root, typer.core.TyperGroup):
        root.commands[command]()  # not by way of the root, whose name usage lines would repeat
