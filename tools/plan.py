"""`llama-mcore plan`. See `python tools/plan.py --help`, and docs/planner.md."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # llama_mcore of this checkout, installed or not

import llama_mcore.installed  # noqa: F401

# isort: split
from llama_mcore.cli.plan import app

if __name__ == "__main__":
    app()
