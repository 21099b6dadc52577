"""`llama-mcore audit-data`. See `python tools/audit_data.py --help`."""

from llama_mcore.cli import main

if __name__ == "__main__":
    main("audit-data")
