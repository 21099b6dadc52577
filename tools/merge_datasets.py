"""`llama-mcore merge-datasets`. See `python tools/merge_datasets.py --help`."""

from llama_mcore.cli import main

if __name__ == "__main__":
    main("merge-datasets")
