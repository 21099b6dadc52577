"""`llama-mcore train`. See `python tools/train.py --help`."""

import signal

# Before anything slow: a request to stop waits until there is somebody to obey it.
signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT))

from llama_mcore.cli import main  # noqa: E402

if __name__ == "__main__":
    main("train")
