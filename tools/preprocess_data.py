"""`llama-mcore preprocess-data`. See `python tools/preprocess_data.py --help`."""

from llama_mcore.cli import main

if __name__ == "__main__":
    main("preprocess-data")
