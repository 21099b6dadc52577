"""`llama-mcore generate`. See `python tools/generate.py --help`."""

from llama_mcore.cli import main

if __name__ == "__main__":
    main("generate")
