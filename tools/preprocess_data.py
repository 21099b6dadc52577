"""`llama-mcore preprocess-data`. See `python tools/preprocess_data.py --help`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # llama_mcore of this checkout, installed or not

if __name__ == "__main__":
    # Imported here: a worker runs this file too, and needs no command line.
    from llama_mcore.cli import main

    main("preprocess-data")
