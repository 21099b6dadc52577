"""`llama-mcore train`. See `python tools/train.py --help`."""

import signal
import sys
from pathlib import Path

# Before anything slow: a request to stop waits until there is somebody to obey it.
signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT))

sys.path.insert(0, str(Path(__file__).parents[1]))  # llama_mcore of this checkout, installed or not

from llama_mcore.cli import main  # noqa: E402

if __name__ == "__main__":
    main("train")
