"""`llama-mcore convert`. See `python tools/convert_checkpoint.py --help`."""

from llama_mcore.cli import main

if __name__ == "__main__":
    main("convert")
