"""Worker: `llama-mcore torchrun` for many virtual nodes of one machine, which pays its imports once.

    python tests/slurm/warm_launcher.py SOCKET

serves what tests/slurm/bin/llama-mcore passes on: for each start it forks, takes over directory, environment
and output of the one who asked, and runs the real launcher there. The answer is its exit code.
"""

import json
import os
import selectors
import socket
import sys
from pathlib import Path

from llama_mcore.launch.torchrun import run

_LARGEST = 1 << 20


def main() -> None:
    path = Path(sys.argv[1])
    server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    server.bind(str(path.with_suffix(".tmp")))
    server.listen(4096)
    path.with_suffix(".tmp").rename(path)  # not to be seen before it listens
    running: dict[int, socket.socket] = {}
    with selectors.DefaultSelector() as ready:
        ready.register(server, selectors.EVENT_READ)
        while True:
            if ready.select(timeout=0.05):
                asked, _ = server.accept()
                running[_start(asked)] = asked
            _answer(running)


def _start(asked: socket.socket) -> int:
    content, streams, _, _ = socket.recv_fds(asked, _LARGEST, 2)
    child = os.fork()
    if child:
        for stream in streams:
            os.close(stream)
        return child
    for number, stream in enumerate(streams, start=1):
        os.dup2(stream, number)
    request = json.loads(content)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    os._exit(run(request["arguments"]))


def _answer(running: dict[int, socket.socket]) -> None:
    while running:
        child, status = os.waitpid(-1, os.WNOHANG)
        if not child:
            return
        with running.pop(child) as asked:
            asked.send(bytes([os.waitstatus_to_exitcode(status) & 0xFF]))


if __name__ == "__main__":
    main()
