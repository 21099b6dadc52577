"""Order of training windows: a pure function of (seed, position), the same on any number of ranks.

Each epoch visits every window once, in the order of a keyed permutation of [0, num_windows): a Feistel
network over the next power of four, walked until it lands inside (Black and Rogaway, "Ciphers with Arbitrary
Finite Domains", 2002). Nothing is stored or shuffled, so a trillion tokens start as fast as a thousand and
any position is reached at once. Runs depend on these numbers: a change here changes what a resumed run reads.
"""

import hashlib

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 6
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
# The two multipliers of SplitMix64's finalizer.
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)

Words = NDArray[np.uint64]


def source_seed(seed: int, name: str) -> int:
    """Seed of a source's order, from its name, so that it does not depend on the other sources."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8])


def windows_at(positions: NDArray[np.int64], num_windows: int, seed: int) -> NDArray[np.int64]:
    """Windows that the samples at `positions`, counted over all epochs, read."""
    epochs, indices = np.divmod(positions.astype(np.uint64), np.uint64(num_windows))
    keys = _mix(_mix(np.full(positions.shape, seed % 2**64, dtype=np.uint64)) + epochs)
    half_bits = max(1, ((num_windows - 1).bit_length() + 1) // 2)
    windows = _feistel(indices, keys, half_bits)
    outside = np.flatnonzero(windows >= num_windows)
    while outside.size:
        windows[outside] = _feistel(windows[outside], keys[outside], half_bits)
        outside = outside[windows[outside] >= num_windows]
    return windows.astype(np.int64)


def _feistel(values: Words, keys: Words, half_bits: int) -> Words:
    """Permutation of [0, 4**half_bits), chosen by the key of each value."""
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = values >> shift, values & mask
    for _ in range(_ROUNDS):
        keys = _mix(keys)
        left, right = right, left ^ (_mix(right ^ keys) & mask)
    return (left << shift) | right


def _mix(words: Words) -> Words:
    """SplitMix64: every input bit reaches every output bit. Arithmetic modulo 2**64."""
    words = words + _GOLDEN
    words = (words ^ (words >> np.uint64(30))) * _MIX_1
    words = (words ^ (words >> np.uint64(27))) * _MIX_2
    return words ^ (words >> np.uint64(31))
