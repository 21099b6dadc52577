"""Conventions that commands share: groups of commands, common options, several values for one option."""

from typing import Annotated, Any

import typer
from typer.core import TyperCommand

Debug = Annotated[bool, typer.Option("--debug", help="Print a traceback with an error.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Config = Annotated[str, typer.Option(help="YAML file, or a shipped one: tiny, 7b, 13b, 33b, 65b.")]
SourceFormat = Annotated[
    str | None, typer.Option("--from", help="Format of the checkpoint; default: what it looks like.")
]
NamedModel = Annotated[
    str | None,
    typer.Option(help="Preset, run YAML or config.json, for a checkpoint that does not describe its model."),
]


def command_group(name: str | None = None, help: str | None = None) -> typer.Typer:
    """Commands under one name; without a name, those of a file, to be added to the group above."""
    return typer.Typer(
        name=name,
        help=help,
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )


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
