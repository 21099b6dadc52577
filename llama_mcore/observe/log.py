"""Logger of the package, without the start-up noise of the libraries."""

import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import TextIO

NAME = "llama_mcore"
TIME = "%Y-%m-%d %H:%M:%S"  # local time, as in Slurm's own log


def get_logger() -> logging.Logger:
    return logging.getLogger(NAME)


def setup_logging(rank: int) -> logging.Logger:
    """Set up logging to stderr: rank 0 from INFO on, the others warnings and errors, prefixed with the
    rank."""
    prefix = "" if rank == 0 else f"[rank {rank}] "
    handler = _StderrHandler()
    handler.setFormatter(logging.Formatter(f"%(asctime)s {prefix}%(levelname)s %(message)s", TIME))
    logger = get_logger()
    logger.handlers = [handler]
    logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    logger.propagate = False
    return logger


def silence_libraries(cpu: bool) -> None:
    """Filter the messages of megatron-core and DeepSpeed at every start; call before either is imported.

    `cpu`: this job uses no GPU, so DeepSpeed need not search for one and warn that it found none. Warnings of
    other modules, errors and exceptions stay.
    """
    warnings.filterwarnings("ignore", module=r"megatron\.")
    # Both libraries call these collectives by their old names; the warning names the caller's module.
    warnings.filterwarnings(
        "ignore",
        message=r"`torch\.distributed\.(_?all_gather|_?reduce_scatter)\w*` is .*deprecated",
        category=FutureWarning,
    )
    logging.getLogger("megatron.core.models.gpt.gpt_model").addFilter(_is_not_deprecation)
    if cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        # it warns of a missing GPU wherever the CUDA toolkit is installed
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)


def _is_not_deprecation(record: logging.LogRecord) -> bool:
    # megatron-core 0.19 recommends another model class at each start
    return "GPTModel IS DEPRECATED" not in record.getMessage()


@contextmanager
def prints_as_debug() -> Iterator[None]:
    """Log printed lines at DEBUG, as of `deepspeed.initialize`, which prints its memory use; before an
    exception, which they may explain, as warnings."""
    captured, level = io.StringIO(), logging.WARNING
    try:
        with redirect_stdout(captured):
            yield
        level = logging.DEBUG
    finally:
        for line in captured.getvalue().splitlines():
            get_logger().log(level, line)


class _StderrHandler(logging.StreamHandler):
    """Handler for the current sys.stderr, which rich replaces while it draws a progress line."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:
        return sys.stderr
