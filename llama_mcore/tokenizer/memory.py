"""Memory that SentencePiece's BPE trainer will need, estimated before it starts: it holds all of its text."""

from collections.abc import Sequence
from zlib import crc32

import psutil

from llama_mcore.errors import PreflightError, Problem

# Peak of the process over what it held before, measured with sentencepiece 0.2.3 on 1 to 60 MB of source
# code, English-like and Cyrillic words, unspaced Chinese and random letters, vocabularies of 4,000 to 32,000.
# Lines of two bytes give the cost of a line, few words over and over that of a byte of text. A distinct word
# costs 45 (source code) to 145 (unspaced ideographs) bytes a character, for each place where two symbols meet
# is kept. The rule takes the most and came out at 1.0 to 2.7 times what was measured; only noise, ideographs
# all equally frequent, took up to twice as much as it says.
_BYTES_FIXED = 64_000_000
_BYTES_PER_TEXT_BYTE = 4
_BYTES_PER_LINE = 56
_BYTES_PER_WORD_CHARACTER = 150
# Distinct words are counted by those whose hash falls in one of this many classes (Gibbons, "Distinct
# sampling for highly-accurate answers to distinct values queries and event reports", VLDB 2001).
_WORD_CLASSES = 64
_SHARE_OF_AVAILABLE = 0.8


class TrainerMemory:
    """Estimate that grows as text comes, and refuses text that would need more than the limit.

    `limit` is in bytes; the default is 80 % of what the machine has available.
    """

    def __init__(self, limit: int | None, num_sources: int) -> None:
        self.limit = limit or int(_SHARE_OF_AVAILABLE * psutil.virtual_memory().available)
        self.text_bytes = self.num_lines = 0
        self._num_sources = num_sources
        self._words: set[bytes] = set()
        self._word_characters = 0

    def check_ahead(self, text_bytes: int) -> None:
        """Raise PreflightError if so much text needs more than the limit even with few distinct words."""
        peak = _BYTES_FIXED + _BYTES_PER_TEXT_BYTE * text_bytes
        if peak > self.limit:
            raise self._refusal(peak, f"{_size(text_bytes)} of text", text_bytes)

    def add(self, lines: Sequence[bytes]) -> None:
        """Count lines; raise PreflightError as soon as the limit is exceeded."""
        self.text_bytes += sum(map(len, lines))
        self.num_lines += len(lines)
        words = {word for line in lines for word in line.split(b" ") if not crc32(word) % _WORD_CLASSES}
        words -= self._words
        self._words |= words
        # One more: the mark that stands for the space before a word.
        self._word_characters += sum(len(word.decode(errors="replace")) + 1 for word in words)
        if self.peak > self.limit:
            read = f"the first {_size(self.text_bytes)} of text read"
            raise self._refusal(self.peak, read, self.text_bytes)

    @property
    def peak(self) -> int:
        """Bytes that training on all lines so far will need."""
        return (
            _BYTES_FIXED
            + _BYTES_PER_TEXT_BYTE * self.text_bytes
            + _BYTES_PER_LINE * self.num_lines
            + _BYTES_PER_WORD_CHARACTER * _WORD_CLASSES * self._word_characters
        )

    def _refusal(self, peak: int, what: str, text_bytes: int) -> PreflightError:
        # The budget in proportion is safe: distinct words grow more slowly than text.
        reason = f"training on {what} needs about {_size(peak)}"
        fits = text_bytes * max(self.limit - _BYTES_FIXED, 0) // peak // self._num_sources
        remedy = f"give --bytes-per-source {_round_down(fits)}, or use a machine with more memory"
        return PreflightError(Problem("--max-memory", _size(self.limit), reason, remedy))


def _size(size: int) -> str:
    return f"{size / 1e9:,.2f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"


def _round_down(size: int) -> str:
    """Size rounded down to two digits, as units.parse_bytes reads it: 12345678 -> 12MB."""
    digits = 10 ** max(len(str(size)) - 2, 0)
    rounded = size // digits * digits
    return f"{rounded / 1e6:g}MB" if rounded >= 10**6 else f"{rounded / 1e3:g}KB"
