"""Sizes as people write them."""

import re

from llama_mcore.errors import ConfigError, Problem

_FACTORS = {
    "": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
}


def parse_bytes(field: str, text: str) -> int:
    """5GB, 500MB, 2GiB or a plain number -> bytes. Raises ConfigError naming `field`."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    factor = _FACTORS.get(match[2].upper()) if match else None
    size = int(float(match[1]) * factor) if match and factor else 0
    if size < 1:
        raise ConfigError(Problem(field, text, "is not a size", "write it like 500MB, 5GB or 2GiB"))
    return size
