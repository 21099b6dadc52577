"""`llama-mcore inspect-checkpoint`. See `python tools/inspect_checkpoint.py --help`."""

from llama_mcore.cli import main

if __name__ == "__main__":
    main("inspect-checkpoint")
