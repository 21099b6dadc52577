"""Sizes and counts as people write and read them."""

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
    """Bytes of 5GB, 500MB, 2GiB or a plain number. Raises ConfigError naming `field`."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    factor = _FACTORS.get(match[2].upper()) if match else None
    size = int(float(match[1]) * factor) if match and factor else 0
    if size < 1:
        raise ConfigError(Problem(field, text, "is not a size", "write it like 500MB, 5GB or 2GiB"))
    return size


_COUNT_FACTORS = {"": 1.0, "K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}


def parse_count(field: str, text: str, at_least: float, at_most: float, whole: bool = False) -> float:
    """Number written as 1.4T, 65B, 5.6e23 or plainly.

    Raises ConfigError naming `field` if it is not a number, out of bounds, or not whole although it must be.
    """
    match = re.fullmatch(r"(\d{1,40}(?:\.\d{1,40})?(?:[eE][+-]?\d{1,4})?)\s*([KMBTkmbt]?)", text.strip())
    count = float(match[1]) * _COUNT_FACTORS[match[2].upper()] if match else None
    if count is None or not at_least <= count <= at_most or (whole and count % 1):
        reason = f"must be a {'whole ' if whole else ''}number from {at_least:g} to {at_most:g}"
        example = "64 or 2K" if whole else "1.4T, 65B, 0.4 or 5.6e23"
        raise ConfigError(Problem(field, text, reason, f"write it like {example}"))
    return count


def format_bytes(count: int) -> str:
    """Size as 12.6 GiB; the `80 GB` of a GPU are 80 GiB."""
    for power, unit in ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        if count >= 1024**power:
            return f"{count / 1024**power:.1f} {unit}"
    return f"{count} B"


def format_count(number: float) -> str:
    """Number to three digits, as parse_count reads it: 6.74B, 1.40T, 950M."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(number) >= 0.9995 * size:
            return f"{_three_digits(number / size)}{unit}"
    return _three_digits(number)


def _three_digits(number: float) -> str:
    size = abs(number)
    return f"{number:.2f}" if size < 9.995 else f"{number:.1f}" if size < 99.95 else f"{number:,.0f}"
