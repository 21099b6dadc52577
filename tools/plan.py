"""`llama-mcore plan`. See `python tools/plan.py --help`, and docs/planner.md."""

from llama_mcore.plan.cli import app

if __name__ == "__main__":
    app()
