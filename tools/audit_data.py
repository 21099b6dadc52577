"""`llama-mcore audit-data`. See `python tools/audit_data.py --help`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # llama_mcore of this checkout, installed or not

from llama_mcore.cli import main

if __name__ == "__main__":
    main("audit-data")
