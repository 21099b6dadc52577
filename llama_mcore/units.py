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


_COUNT_FACTORS = {"": 1.0, "K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}


def parse_count(field: str, text: str, at_least: float, at_most: float, whole: bool = False) -> float:
    """1.4T, 65B, 5.6e23 or a plain number.

    Raises ConfigError naming `field` for what is none, out of bounds or, where it must be, not whole.
    """
    match = re.fullmatch(r"(\d{1,40}(?:\.\d{1,40})?(?:[eE][+-]?\d{1,4})?)\s*([KMBTkmbt]?)", text.strip())
    count = float(match[1]) * _COUNT_FACTORS[match[2].upper()] if match else None
    if count is None or not at_least <= count <= at_most or (whole and count % 1):
        bound = f"must be a {'whole ' if whole else ''}number from {at_least:g} to {at_most:g}"
        raise ConfigError(Problem(field, text, bound, "write it like 1.4T, 65B, 0.4 or 5.6e23"))
    return count
