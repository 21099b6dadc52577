"""`llama-mcore compare-checkpoints`. See `python tools/compare_checkpoints.py --help`."""

from llama_mcore.cli import main

if __name__ == "__main__":
    main("compare-checkpoints")
