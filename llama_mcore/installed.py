"""Ends a program that was started outside its environment, with one line in place of a traceback.

Imported before all that needs a package: by the command line, and by tools that are more than one of its
commands.
"""

import sys
from importlib.util import find_spec

OLDEST_PYTHON = (3, 11)
NEEDED = ("typer", "pydantic", "orjson", "rich")
"""Packages of requirements.txt that the command line is made of."""
NOT_AVAILABLE = 69


def refusal() -> str:
    """Why this Python cannot run llama_mcore, and what to do; empty if it can."""
    remedy = "run `make venv` in the clone, then `source .venv/bin/activate`"
    if sys.version_info < OLDEST_PYTHON:
        return f"Python {sys.version.split()[0]} is older than 3.11: {remedy}"
    missing = [name for name in NEEDED if find_spec(name) is None]
    return f"{sys.executable} has no {', '.join(missing)}: {remedy}" if missing else ""


if reason := refusal():
    print(f"environment error: {reason}", file=sys.stderr)
    sys.exit(NOT_AVAILABLE)
