"""Files of torch.save, without unpickling them here: a child process says what they hold and where.

The child (sandbox.py) reads with torch's weights-only unpickler and an allow-list, and answers in JSON.
Tensors are then read from the places that it names, like those of any other format.
"""

import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from llama_mcore.checkpoint.safetensors_io import StoredTensor
from llama_mcore.convert.torch_pickle.process import PickledProcess
from llama_mcore.errors import CheckpointError, MissingInputError, Problem, input_problem, say, shown
from llama_mcore.small_file import parse_json

_process = PickledProcess()
_SECONDS = 600
_DTYPES = {
    **{
        f"float{bits}": dtype
        for bits, dtype in ((16, torch.float16), (32, torch.float32), (64, torch.float64))
    },
    **{f"int{bits}": dtype for bits, dtype in ((8, torch.int8), (16, torch.int16), (32, torch.int32))},
    "int64": torch.int64,
    "bfloat16": torch.bfloat16,
    "uint8": torch.uint8,
    "bool": torch.bool,
}
_ANSWER_CONTAINERS = 1 << 24
Stretch = tuple[Path, int, int | None]
"""A file, the byte at which what torch.save wrote begins, and its length (None: to the end of the file)."""


def read_pickled(paths: Sequence[Path], allowed: Iterable[str] = ()) -> list[Any]:
    """What each file of torch.save holds: plain values, with a StoredTensor for each tensor.

    `allowed`: classes, as "module.Class", whose objects become dicts of their fields. A dict with keys other
    than strings stays one; a key that is an object becomes a tuple of its (field, value). Raises
    CheckpointError for a file that needs any other class, with its name, or is no such file;
    MissingInputError for one that is not there.
    """
    return read_stretches([(path, 0, None) for path in paths], allowed)


def read_bare_pickle(path: Path, allowed: Iterable[str] = ()) -> Any:
    """As `read_pickled`, for a file that Python's pickle wrote without torch.save."""
    return _read([(path, 0, None)], allowed, bare=True)[0]


def read_stretches(stretches: Sequence[Stretch], allowed: Iterable[str] = ()) -> list[Any]:
    """As `read_pickled`, for what lies in the middle of files."""
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
    say(f"{_named(question['files'])}, read as weights only in a process of its own")
    try:
        answer = parse_json(_process.ask(json.dumps(question), _SECONDS).encode(), _ANSWER_CONTAINERS)
    except TimeoutError:
        raise CheckpointError(Problem("file", first, f"was not read within {_SECONDS} s")) from None
    except (EOFError, ValueError) as error:
        raise CheckpointError(Problem("file", first, f"cannot be read: {shown(error)}")) from None
    assert isinstance(answer, dict)
    return answer


def _named(files: list[list[Any]]) -> str:
    """The file, or the folder of all of them and their number."""
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
    """Lists become tuples; records become tuples of their (field, value)."""
    if isinstance(key, dict):
        return tuple((field, _key(value)) for field, value in key.items())
    return tuple(map(_key, key)) if isinstance(key, list) else key


def _tensor(where: dict[str, Any], path: Path) -> StoredTensor:
    dtype = _DTYPES.get(where["dtype"])
    if dtype is None:
        raise CheckpointError(Problem("file", path, f"holds a tensor of {shown(where['dtype'])}"))
    stride = where["stride"] and tuple(where["stride"])
    return StoredTensor(path, where["offset"], dtype, torch.Size(where["shape"]), stride)
