"""`llama-mcore train-tokenizer`. See `python tools/train_tokenizer.py --help`."""

from llama_mcore.cli import main

if __name__ == "__main__":
    main("train-tokenizer")
