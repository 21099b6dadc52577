"""The commands of `llama-mcore plan`. Each imports what it needs when it runs; none loads torch."""

import typer

app = typer.Typer(
    name="plan",
    help="What to train, on how many tokens, and on which layout: answered before a GPU is taken.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback()
def _root() -> None:
    """Keeps the sub-command an argument however many there are."""
