"""`llama-mcore train`. See `python tools/train.py --help`."""

from llama_mcore.cli import main

if __name__ == "__main__":
    main("train")
