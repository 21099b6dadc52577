"""Training text of a tokenizer: its sources, and a uniform sample of the lines of each."""

import os
import random
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import zstandard

from llama_mcore.errors import ConfigError, Problem
from llama_mcore.preprocess.inputs import InputFile, find_inputs
from llama_mcore.preprocess.readers import read_records
from llama_mcore.progress import ByteProgress
from llama_mcore.tokenizer.memory import TrainerMemory

# SentencePiece skips longer lines (LLaMA's own setting) and lines with U+2585, its own mark for the unknown.
MAX_LINE_BYTES = 4192
_RESERVED = "\u2585".encode()
REPORT_BYTES = 1_000_000
_START_BYTES = 1 << 18  # more than a block of zstd, which gives nothing before its first is whole
# The sample is cut back when it has grown to this many budgets: often enough to stay small, seldom enough
# that cutting costs little beside reading.
_SLACK = 1.25


@dataclass
class TextSource:
    """A named part of the training text, with counts of the lines in it and of those used."""

    name: str
    files: list[InputFile]
    documents: int = 0
    lines: int = 0
    """Lines that are neither empty nor left out."""
    text_bytes: int = 0
    """Bytes of these lines, without line ends."""
    lines_used: int = 0
    text_bytes_used: int = 0
    lines_left_out: int = 0
    """Lines longer than 4,192 bytes or with U+2585, from which SentencePiece does not learn."""
    report_sample: list[bytes] = field(default_factory=list)

    def usable_lines(self, text: str) -> list[bytes]:
        """Count the lines of a document; return those that SentencePiece takes, without their ends."""
        stripped = (line.rstrip(b"\r") for line in text.encode().split(b"\n"))
        lines = [line for line in stripped if line]
        usable = [line for line in lines if len(line) <= MAX_LINE_BYTES and _RESERVED not in line]
        self.documents += 1
        self.lines += len(usable)
        self.text_bytes += sum(map(len, usable))
        self.lines_left_out += len(lines) - len(usable)
        return usable

    def use(self, lines: Sequence[bytes]) -> None:
        self.lines_used += len(lines)
        self.text_bytes_used += sum(map(len, lines))


def find_sources(inputs: Sequence[Path | str]) -> list[TextSource]:
    """Sources of arguments NAME=PATH or PATH, a file, folder or pattern each; several may share a NAME.

    Without a NAME the file, the folder or the start of the pattern gives it, and must be the only one to do
    so.
    """
    named = [_split_name(str(argument)) for argument in inputs]
    files = find_inputs([path for _, path in named])
    sources: dict[str, TextSource] = {}
    for name, path in named:
        own = name or _name_of(path)
        if own in sources and not name:
            reason = f"would be a second source named {own!r}"
            raise ConfigError(Problem("--input", path, reason, "give it a name: --input NAME=PATH"))
        source = sources.setdefault(own, TextSource(own, []))
        source.files += [file for file in files if file.argument == path]
    return list(sources.values())


def _split_name(argument: str) -> tuple[str, str]:
    match = re.fullmatch(r"([A-Za-z0-9][A-Za-z0-9_.-]*)=(.+)", argument)
    return (match[1], match[2]) if match and not os.path.exists(argument) else ("", argument)


def _name_of(path: str) -> str:
    """Name of a source: `wiki` for data/wiki.jsonl.zst and data/wiki-*.jsonl, `books` for books/*.txt."""
    before_pattern = re.split(r"[*?\[]", path)[0]
    stem = re.sub(r"(\.(jsonl|json|txt|parquet))?(\.(gz|zst))?$", "", Path(before_pattern).name)
    return stem.rstrip("-_.") or "text"


class Corpus:
    """All lines to learn from; with `bytes_per_source` a uniform sample of the lines of each source.

    Reading raises PreflightError for text that needs more than `memory` allows. With `for_report` each source
    keeps up to 1 MB of its lines, drawn like the training sample from everything that was read.
    """

    def __init__(
        self,
        sources: Sequence[TextSource],
        json_key: str,
        memory: TrainerMemory,
        *,
        bytes_per_source: int | None,
        seed: int,
        for_report: bool,
    ) -> None:
        self.sources = sources
        self._json_key = json_key
        self._memory = memory
        self._budget = bytes_per_source
        self._seed = seed
        self._for_report = for_report

    @property
    def total_bytes(self) -> int:
        """Bytes of all input files."""
        return sum(file.size for source in self.sources for file in source.files)

    def check_memory_ahead(self) -> None:
        """Raise PreflightError before anything is read, if the sizes of the files suffice to tell."""
        # A file may hold less text than its size, but then the budget that the error names costs nothing.
        sizes = [sum(file.size for file in source.files) for source in self.sources]
        self._memory.check_ahead(sum(min(size, self._budget or size) for size in sizes))

    def lines(self) -> Iterator[bytes]:
        with ByteProgress("train-tokenizer", self.total_bytes) as progress:
            if self._budget is None:
                for source in self.sources:
                    for lines in self._documents(source, progress):
                        source.use(lines)
                        self._memory.add(lines)
                        yield from lines
                return
            samples = [self._sample(source, self._budget, progress) for source in self.sources]
        for lines in samples:
            lines.reverse()
            while lines:  # the trainer makes its own copy: free each line as it goes there
                yield lines.pop()

    def _sample(self, source: TextSource, budget: int, progress: ByteProgress) -> list[bytes]:
        reservoir = Reservoir(budget, f"{self._seed} {source.name}")
        for lines in self._documents(source, progress):
            for line in lines:
                reservoir.add(line)
        sample = reservoir.sample()
        source.use(sample)
        self._memory.add(sample)
        return sample

    def _documents(self, source: TextSource, progress: ByteProgress) -> Iterator[list[bytes]]:
        """Usable lines, document by document."""
        for_report = Reservoir(REPORT_BYTES, f"report {self._seed} {source.name}")
        for file in source.files:
            for text in read_texts(file, self._json_key, progress):
                lines = source.usable_lines(text)
                if self._for_report:
                    for line in lines:
                        for_report.add(line)
                yield lines
        source.report_sample = for_report.sample()


class Reservoir:
    """Uniform sample of at most `budget` bytes of lines; all lines if they fit.

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
            if self._size > _SLACK * self._budget:
                self._cut_back()

    def sample(self) -> list[bytes]:
        """The lines kept so far, in the order in which they came."""
        if self._size > self._budget:
            self._cut_back()
        return self._lines

    def _cut_back(self) -> None:
        # A line that does not fit now never will: the lines before it in the order of keys only become more.
        by_key = np.argsort(self._keys)
        sizes = np.fromiter(map(len, self._lines), dtype=np.int64, count=len(self._lines))
        num_kept = int(np.searchsorted(np.cumsum(sizes[by_key]), self._budget, side="right"))
        self._threshold = self._keys[by_key[num_kept]]
        kept = np.sort(by_key[:num_kept])
        self._keys = [self._keys[i] for i in kept]
        self._lines = [self._lines[i] for i in kept]
        self._size = sum(map(len, self._lines))


def read_texts(file: InputFile, json_key: str, progress: ByteProgress) -> Iterator[str]:
    """The texts of one file. Progress counts bytes on disk, estimated inside a compressed file."""
    expansion = _expansion(file)
    counted = 0
    for record in read_records([file.path], json_key):
        yield record.text(json_key)
        size = int(record.size / expansion)
        if file.format != "stream":  # the size of a stream is not known
            size = min(size, file.size - counted)
        counted += size
        progress.advance(size, documents=1)
    progress.advance(max(file.size - counted, 0))


def _expansion(file: InputFile) -> float:
    """Bytes of text per byte of the file, estimated from its start."""
    if file.format not in ("gzip", "zstd"):
        return 1.0
    with file.path.open("rb") as stream:
        start = stream.read(_START_BYTES)
    decoder: Any = zlib.decompressobj(wbits=31)
    if file.format == "zstd":
        decoder = zstandard.ZstdDecompressor().decompressobj()
    try:
        return max(len(decoder.decompress(start)), 1) / len(start)
    except (zlib.error, zstandard.ZstdError):  # reading will say what is wrong
        return 1.0
