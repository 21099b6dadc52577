"""`llama-mcore inspect-dataset`. See `python tools/inspect_dataset.py --help`."""

from llama_mcore.cli import main

if __name__ == "__main__":
    main("inspect-dataset")
