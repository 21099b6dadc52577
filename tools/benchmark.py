"""`python tools/benchmark.py NAME [--json FILE] [--check]`. See `--help`, and docs/benchmarks.md."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # llama_mcore of this checkout, installed or not

import llama_mcore.installed  # noqa: F401

# isort: split
from llama_mcore.cli.benchmark import app

if __name__ == "__main__":
    app()
