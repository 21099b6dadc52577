"""Small files from untrusted sources: read whole or refused, in bounded time and memory.

Ambiguous content is refused: a key that is there twice, a number that is not finite. Every function raises
OSError or ValueError, whatever is wrong.
"""

import errno
import json
import math
import os
import stat
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from llama_mcore.background import in_background

_LARGEST_INT = (1 << 63) - 1
_DEEPEST = 50
_MOST_CONTAINERS = 1_000_000
_TIMEOUT_S = 60.0


def read_small_file(path: Path, limit: int, *, follow: bool = False) -> bytes:
    """Content of a regular file of at most `limit` bytes; of a symbolic link only with `follow`.

    Does not wait for a pipe, nor longer than a minute for a file system that does not answer (TimeoutError).
    """
    # A system call that the file system does not answer cannot be ended, only left behind in its thread.
    answer = in_background(lambda: _read(path, limit, follow))
    try:
        return answer.result(_TIMEOUT_S)
    except TimeoutError:
        raise TimeoutError(errno.ETIMEDOUT, f"no answer in {_TIMEOUT_S:g} s", str(path)) from None


def _read(path: Path, limit: int, follow: bool) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | (0 if follow else os.O_NOFOLLOW))
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("it is not a regular file")
        size = status.st_size
        if size <= limit:
            content = file.read(limit + 1)  # it may have grown meanwhile
            size = len(content)
        if size > limit:
            raise ValueError(f"it has {size:,} bytes, more than {limit:,}")
        return content


def read_json(path: Path, limit: int, *, follow: bool = False) -> Any:
    return parse_json(read_small_file(path, limit, follow=follow))


def parse_json(text: bytes, most_containers: int = _MOST_CONTAINERS) -> Any:
    """Content of JSON text."""
    # An empty list is two bytes of text, and sixty in memory.
    if text.count(b"[") + text.count(b"{") > most_containers:
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
    """Content of plain YAML text, without tags, which build objects, and without aliases."""
    try:
        content = _PlainLoader(text).get_single_data()
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    _check_depth(content)
    return content


class _PlainLoader(yaml.SafeLoader):
    """Loader without tags and aliases: a few lines of aliases can expand to more than the memory."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            raise ValueError(f"it uses the alias *{event.anchor}: write its value out")
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
    # Content that was parsed at the limit of the stack could not be written again.
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
        raise ValueError(f"it holds {text[:80]}, which is not a finite number")
    return number


def _bounded(number: int) -> int:
    if abs(number) > _LARGEST_INT:
        raise ValueError(f"it holds a whole number beyond {_LARGEST_INT:,}")
    return number
