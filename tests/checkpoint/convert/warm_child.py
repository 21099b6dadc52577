"""The process that reads pickles, forked from this one instead of started anew: torch is imported already.

What it does and how it is bounded is the same; tests that start it many times take seconds, not minutes.
"""

import io
import multiprocessing
import sys
from multiprocessing.connection import Connection

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from llama_mcore.checkpoint.convert import pickled_child

with FakeTensorMode():  # imports more when a tensor is made the first time
    torch.empty(2, 2).t()


class Forked:
    """In place of PickledProcess: a new process for each question."""

    def ask(self, question: str, seconds: float) -> str:
        fork = multiprocessing.get_context("fork")
        receiver, sender = fork.Pipe(duplex=False)
        child = fork.Process(target=_main, args=(question, sender))
        child.start()
        sender.close()
        try:
            output = receiver.recv_bytes().decode()
        except EOFError:
            output = ""
        child.join(seconds)
        assert child.exitcode is not None, "it hangs"
        if not output:
            raise EOFError(f"the process ended with {child.exitcode}")
        return output


def _main(asked: str, sender: Connection) -> None:
    sys.stdin, sys.stdout = io.StringIO(asked), io.StringIO()
    pickled_child.main()
    sender.send_bytes(sys.stdout.getvalue().encode())
