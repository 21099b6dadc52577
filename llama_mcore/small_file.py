"""Text files that somebody else may have written: read whole or refused, in bounded time and memory.

What reads oddly is refused rather than guessed at: a key twice, a number that is no finite one. Every
function raises OSError or ValueError, whatever is wrong.
"""

import errno
import json
import math
import os
import stat
from collections import Counter
from concurrent.futures import Future
from pathlib import Path
from threading import Thread
from typing import Any

import yaml

_LARGEST_INT = (1 << 63) - 1
_DEEPEST = 50
_MOST_CONTAINERS = 1_000_000
_PATIENCE_S = 60.0


def read_small_file(path: Path, limit: int, *, follow: bool = False) -> bytes:
    """A regular file of at most `limit` bytes, read within a minute; a symbolic link only where `follow`.

    Waits for no pipe, and for a file system that does not answer no longer than that minute (TimeoutError).
    """
    answer: Future[bytes] = Future()
    # a system call that a file system does not answer can only be left behind
    Thread(target=_settle, args=(answer, path, limit, follow), daemon=True).start()
    try:
        return answer.result(_PATIENCE_S)
    except TimeoutError:
        raise TimeoutError(errno.ETIMEDOUT, f"no answer in {_PATIENCE_S:g} s", str(path)) from None


def _settle(answer: "Future[bytes]", path: Path, limit: int, follow: bool) -> None:
    try:
        answer.set_result(_read(path, limit, follow))
    except Exception as error:
        answer.set_exception(error)


def _read(path: Path, limit: int, follow: bool) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | (0 if follow else os.O_NOFOLLOW))
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("it is not a regular file")
        size = status.st_size
        if size <= limit:
            content = file.read(limit + 1)  # more than its size, where it is being written
            size = len(content)
        if size > limit:
            raise ValueError(f"it has {size:,} bytes, more than {limit:,}")
        return content


def read_json(path: Path, limit: int, *, follow: bool = False) -> Any:
    return parse_json(read_small_file(path, limit, follow=follow))


def parse_json(text: bytes, most_containers: int = _MOST_CONTAINERS) -> Any:
    """What JSON text says."""
    if text.count(b"[") + text.count(b"{") > most_containers:  # two bytes that take sixty
        raise ValueError(f"it holds more than {most_containers:,} lists and objects")
    try:
        content = json.loads(
            text,
            object_pairs_hook=_unique,
            parse_constant=_finite,
            parse_float=_finite,
            parse_int=lambda digits: _bounded(int(digits)),
        )
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    _check_depth(content)
    return content


def parse_yaml(text: str) -> Any:
    """What plain YAML text says: no tags, which build objects, and no aliases."""
    try:
        content = _PlainLoader(text).get_single_data()
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    _check_depth(content)
    return content


class _PlainLoader(yaml.SafeLoader):
    """A few lines of aliases can stand for more than a machine holds."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            raise ValueError(f"it uses the alias *{event.anchor}: write out what that stands for")
        if getattr(event, "tag", None) is not None:
            raise ValueError(f"it uses the tag {event.tag}")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        _unique([(key.value, None) for key, _ in node.value if isinstance(key, yaml.ScalarNode)])
        return super().construct_mapping(node, deep)

    def construct_bounded_int(self, node: yaml.ScalarNode) -> int:
        return _bounded(self.construct_yaml_int(node))


_PlainLoader.add_constructor("tag:yaml.org,2002:int", _PlainLoader.construct_bounded_int)


def _check_depth(content: Any) -> None:
    """What was parsed at the limit of the stack could not be written again."""
    level = [content]
    for _ in range(_DEEPEST):
        level = [
            child
            for value in level
            if isinstance(value, dict | list)
            for child in (value.values() if isinstance(value, dict) else value)
        ]
    if level:
        raise ValueError("it is nested too deeply")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) < len(pairs):
        (twice, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"it has the key {twice[:80]!r} twice")
    return unique


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"it holds {text[:80]}, which is no finite number")
    return number


def _bounded(number: int) -> int:
    if abs(number) > _LARGEST_INT:
        raise ValueError(f"it holds a whole number beyond {_LARGEST_INT:,}")
    return number
