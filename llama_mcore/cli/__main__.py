"""`python -m llama_mcore.cli` is `llama-mcore`."""

from llama_mcore.cli import main

if __name__ == "__main__":
    main()
