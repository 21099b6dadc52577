"""`python tools/benchmark.py NAME [--json FILE] [--check]`. See `--help`, and docs/benchmarks.md."""

from llama_mcore.benchmark.cli import app

if __name__ == "__main__":
    app()
