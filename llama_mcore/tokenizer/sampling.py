"""A uniform sample of lines under a budget of bytes, in one pass over a text of any length."""

import random

import numpy as np

# The sample is cut back when it has grown to this many budgets: often enough to stay small, seldom enough
# that cutting costs little beside reading.
_ROOM = 1.25


class Reservoir:
    """Keeps `budget` bytes of lines at most, each line as likely as any other; all of them if they fit.

    Each line draws a uniform key as it comes, and the lines with the smallest keys are kept, as many as the
    budget holds. That is A-ES of Efraimidis and Spirakis, "Weighted random sampling with a reservoir"
    (Information Processing Letters 97, 2006), with equal weights and a reservoir measured in bytes.

    The sample is a function of the seed and the lines alone. Memory: 1.25 times the budget and some 70 bytes
    for each line in it, whatever the length of the text. One reservoir for each source makes a stratified
    sample. A line as long as the budget would leave no room for others: keep lines short beside it.
    """

    def __init__(self, budget: int, seed: str) -> None:
        self._budget = budget
        # Seeding with a string hashes it with SHA-512: the same draws on every machine.
        self._draw = random.Random(seed).random
        self._threshold = 1.0
        self._size = 0
        self._keys: list[float] = []
        self._lines: list[bytes] = []

    def add(self, line: bytes) -> None:
        key = self._draw()
        if key < self._threshold:
            self._keys.append(key)
            self._lines.append(line)
            self._size += len(line)
            if self._size > _ROOM * self._budget:
                self._cut_back()

    def sample(self) -> list[bytes]:
        """The lines kept so far, in the order in which they came."""
        if self._size > self._budget:
            self._cut_back()
        return self._lines

    def _cut_back(self) -> None:
        """What does not fit now never will: the lines before it in the order of keys only become more."""
        by_key = np.argsort(self._keys)
        sizes = np.fromiter(map(len, self._lines), dtype=np.int64, count=len(self._lines))
        num_kept = int(np.searchsorted(np.cumsum(sizes[by_key]), self._budget, side="right"))
        self._threshold = self._keys[by_key[num_kept]]
        kept = np.sort(by_key[:num_kept])
        self._keys = [self._keys[i] for i in kept]
        self._lines = [self._lines[i] for i in kept]
        self._size = sum(map(len, self._lines))
