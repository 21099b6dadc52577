"""One logger for the package, and the start-up noise of the libraries kept out of it."""

import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import TextIO

NAME = "llama_mcore"
TIME = "%Y-%m-%d %H:%M:%S"  # local, as Slurm's own log has it


def get_logger() -> logging.Logger:
    return logging.getLogger(NAME)


def setup_logging(rank: int) -> logging.Logger:
    """Log to stderr: rank 0 from INFO on, the others warnings and errors under their rank."""
    prefix = "" if rank == 0 else f"[rank {rank}] "
    handler = _StderrHandler()
    handler.setFormatter(logging.Formatter(f"%(asctime)s {prefix}%(levelname)s %(message)s", TIME))
    logger = get_logger()
    logger.handlers = [handler]
    logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    logger.propagate = False
    return logger


def silence_libraries(cpu: bool) -> None:
    """Filter what megatron-core and DeepSpeed say at every start; call before either is imported.

    `cpu`: this job runs without a GPU; DeepSpeed then need not look for one and warn that it found none.
    Warnings of other modules, errors and exceptions stay.
    """
    warnings.filterwarnings("ignore", module=r"megatron\.")
    # Both libraries call these collectives by their old names; the warning names the caller's module.
    warnings.filterwarnings(
        "ignore",
        message=r"`torch\.distributed\.(_?all_gather|_?reduce_scatter)\w*` is .*deprecated",
        category=FutureWarning,
    )
    logging.getLogger("megatron.core.models.gpt.gpt_model").addFilter(_is_no_advice)
    if cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        # it misses a GPU wherever the CUDA toolkit lies
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)


def _is_no_advice(record: logging.LogRecord) -> bool:
    """megatron-core 0.19 recommends another model at each start."""
    return "GPTModel IS DEPRECATED" not in record.getMessage()


@contextmanager
def prints_as_debug() -> Iterator[None]:
    """Log what is printed inside at DEBUG: `deepspeed.initialize` prints its memory use unasked.

    What was printed before an exception may explain it, and is logged as a warning.
    """
    captured, level = io.StringIO(), logging.WARNING
    try:
        with redirect_stdout(captured):
            yield
        level = logging.DEBUG
    finally:
        for line in captured.getvalue().splitlines():
            get_logger().log(level, line)


class _StderrHandler(logging.StreamHandler):
    """Writes to whatever sys.stderr is now: rich replaces it while a progress line is drawn."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:
        return sys.stderr
