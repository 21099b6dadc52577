"""`llama-mcore preprocess-data`. See `python tools/preprocess_data.py --help`."""

if __name__ == "__main__":
    # Imported here: a worker runs this file too, and needs no command line.
    from llama_mcore.cli import main

    main("preprocess-data")
