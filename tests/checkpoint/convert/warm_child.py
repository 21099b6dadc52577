"""The process that reads pickles, forked from this one instead of started anew: torch is imported already.

What it does and how it is bounded is the same; tests that start it many times take seconds, not minutes.
"""

import io
import multiprocessing
import subprocess
import sys
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from llama_mcore.checkpoint.convert import pickled_child

with FakeTensorMode():  # imports more when a tensor is made the first time
    torch.empty(2, 2).t()


def run(words: list[str], *, input: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """In place of subprocess.run in pickled.py."""
    fork = multiprocessing.get_context("fork")
    receiver, sender = fork.Pipe(duplex=False)
    child = fork.Process(target=_main, args=(input, sender))
    child.start()
    sender.close()
    try:
        output = receiver.recv_bytes().decode()
    except EOFError:
        output = ""
    child.join(options["timeout"])
    assert child.exitcode is not None, "it hangs"
    return subprocess.CompletedProcess(words, child.exitcode, stdout=output, stderr="")


def _main(asked: str, sender: Connection) -> None:
    sys.stdin, sys.stdout = io.StringIO(asked), io.StringIO()
    pickled_child.main()
    sender.send_bytes(sys.stdout.getvalue().encode())
