"""Reader of torch.save files that unpickles nothing itself: a child process says what they hold and where.

The child (sandbox.py) reads with torch's weights-only unpickler and an allow-list, and answers in JSON.
Tensors are then read from the places that it names, like those of any other format.
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import IO, Any

import torch

from llama_mcore.checkpoint.safetensors_io import StoredTensor
from llama_mcore.errors import CheckpointError, MissingInputError, Problem, input_problem, say, shown
from llama_mcore.small_file import parse_json

_COMMAND = (sys.executable, "-m", "llama_mcore.convert.torch_pickle.sandbox")
_TIMEOUT_S = 600
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
        *(torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.bool),
    )
}
_ANSWER_CONTAINERS = 1 << 24
Stretch = tuple[Path, int, int | None]
"""A file, the byte at which the output of torch.save begins, and its length (None: to the end)."""


def read_pickled(paths: Sequence[Path], allowed: Iterable[str] = ()) -> list[Any]:
    """Content of each torch.save file: plain values, with a StoredTensor for each tensor.

    `allowed`: classes, as "module.Class", whose objects become dicts of their fields. A dict with keys other
    than strings stays one; a key that is an object becomes a tuple of its (field, value). Raises
    CheckpointError for a file that needs any other class, with its name, or is not such a file;
    MissingInputError for a missing one.
    """
    return read_stretches([(path, 0, None) for path in paths], allowed)


def read_bare_pickle(path: Path, allowed: Iterable[str] = ()) -> Any:
    """Content of a file that Python's pickle wrote without torch.save; as `read_pickled`."""
    return _read([(path, 0, None)], allowed, bare=True)[0]


def read_stretches(stretches: Sequence[Stretch], allowed: Iterable[str] = ()) -> list[Any]:
    """Content of outputs of torch.save in the middle of files; as `read_pickled`."""
    return _read(stretches, allowed, bare=False)


def _read(stretches: Sequence[Stretch], allowed: Iterable[str], bare: bool) -> list[Any]:
    for path in dict.fromkeys(path for path, _, _ in stretches):
        _check_regular(path)
    if not stretches:
        return []
    files = [[str(path.resolve()), offset, length] for path, offset, length in stretches]
    answer = _ask({"files": files, "allowed": sorted(allowed), "bare": bare}, stretches[0][0])
    if "refused" in answer:
        path = stretches[answer["refused"]][0]
        raise CheckpointError(Problem("file", path, shown(answer["reason"], 500)))
    contents = answer["contents"]
    return [_built(content, path) for content, (path, _, _) in zip(contents, stretches, strict=True)]


def _check_regular(path: Path) -> None:
    if not path.exists():
        raise MissingInputError(input_problem("file", path))
    if not path.is_file():
        raise CheckpointError(Problem("file", path, "is not a regular file"))


def _ask(question: dict[str, Any], first: Path) -> dict[str, Any]:
    say(f"{_named(question['files'])}, read as weights only in a separate process")
    try:
        answer = parse_json(_process.ask(json.dumps(question), _TIMEOUT_S).encode(), _ANSWER_CONTAINERS)
    except TimeoutError:
        raise CheckpointError(Problem("file", first, f"was not read within {_TIMEOUT_S} s")) from None
    except (EOFError, ValueError) as error:
        raise CheckpointError(Problem("file", first, f"cannot be read: {shown(error)}")) from None
    assert isinstance(answer, dict)
    return answer


def _named(files: list[list[Any]]) -> str:
    """The file, or the folder of the files and their number."""
    paths = {path for path, *_ in files}
    if len(paths) == 1:
        return f"{paths.pop()}: {'a pickle' if len(files) == 1 else f'{len(files):,} pickles'}"
    return f"{os.path.commonpath(paths)}: {len(paths):,} files of pickles"


def _built(value: Any, path: Path) -> Any:
    if isinstance(value, list):
        return [_built(each, path) for each in value]
    if not isinstance(value, dict):
        return value
    makers: dict[str, Callable[[], Any]] = {
        "$tensor": lambda: _tensor(value["$tensor"], path),
        "$record": lambda: _built(value["fields"], path),
        "$pairs": lambda: {_key(_built(k, path)): _built(each, path) for k, each in value["$pairs"]},
        "$unknown": lambda: None,
    }
    for mark, make in makers.items():
        if mark in value:
            return make()
    return {key: _built(each, path) for key, each in value.items()}


def _key(key: Any) -> Any:
    """A hashable key: lists become tuples, records tuples of their (field, value)."""
    if isinstance(key, dict):
        return tuple((field, _key(value)) for field, value in key.items())
    return tuple(map(_key, key)) if isinstance(key, list) else key


def _tensor(where: dict[str, Any], path: Path) -> StoredTensor:
    dtype = _DTYPES.get(where["dtype"])
    if dtype is None:
        reason = f"holds a tensor of {shown(where['dtype'])}, which is not supported"
        raise CheckpointError(Problem("file", path, reason))
    stride = where["stride"] and tuple(where["stride"])
    return StoredTensor(path, where["offset"], dtype, torch.Size(where["shape"]), stride)


class SandboxProcess:
    """The process that reads pickles: started for the first question, and replaced if it fails.

    A question is a line of JSON, and so is the answer. It ends with this process.
    """

    def __init__(self, command: Sequence[str] = _COMMAND) -> None:
        self._command = command
        self._process: subprocess.Popen[str] | None = None
        self._errors: IO[str] | None = None
        self._owner = 0

    def ask(self, question: str, seconds: float) -> str:
        """The answer. Raises TimeoutError, and EOFError with the last words of a process that ended."""
        process = self._running()
        assert process.stdin
        assert process.stdout
        deadline = time.monotonic() + seconds
        timer = threading.Timer(seconds, process.kill)
        timer.start()
        try:
            process.stdin.write(question + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        except OSError:
            answer = ""
        timer.cancel()
        if answer.endswith("\n"):
            return answer
        reason = self._end()
        raise TimeoutError if time.monotonic() >= deadline else EOFError(reason)

    def _running(self) -> "subprocess.Popen[str]":
        if self._process is None or self._owner != os.getpid():  # a fork inherits its pipes
            self._errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115  as long as the process
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                text=True,
            )
            self._owner = os.getpid()
        return self._process

    def _end(self) -> str:
        """Kill it; its exit code and the last line of its errors."""
        assert self._process
        assert self._errors
        self._process.kill()
        code = self._process.wait()
        self._errors.seek(0)
        last = self._errors.read().strip().splitlines()[-1:]
        self._process = None
        return f"the reading process ended with {code}" + (f": {last[0]}" if last else "")


_process = SandboxProcess()
