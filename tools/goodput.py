"""`llama-mcore goodput`. See `python tools/goodput.py --help`."""

from llama_mcore.cli import main

if __name__ == "__main__":
    main("goodput")
