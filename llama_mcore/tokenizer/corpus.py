"""The lines that a tokenizer learns from, source by source."""

import os
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import zstandard

from llama_mcore.errors import ConfigError, Problem
from llama_mcore.preprocess.inputs import InputFile, find_inputs
from llama_mcore.preprocess.readers import read_records
from llama_mcore.progress import ByteProgress
from llama_mcore.tokenizer.memory import TrainerMemory
from llama_mcore.tokenizer.sampling import Reservoir

# SentencePiece passes over longer lines (LLaMA's own setting) and over lines with U+2585, its own mark for
# the unknown.
MAX_LINE_BYTES = 4192
_RESERVED = "\u2585".encode()
REPORT_BYTES = 1_000_000
_START_BYTES = 1 << 18  # more than a block of zstd, which gives nothing before its first is whole


@dataclass
class TextSource:
    """A named part of the training text and what was used of it."""

    name: str
    files: list[InputFile]
    documents: int = 0
    lines: int = 0
    """Neither empty nor left out."""
    text_bytes: int = 0
    """Of these lines, without line ends."""
    lines_used: int = 0
    text_bytes_used: int = 0
    lines_left_out: int = 0
    """Longer than 4,192 bytes or with U+2585: SentencePiece does not learn from them."""
    report_sample: list[bytes] = field(default_factory=list)

    def usable_lines(self, text: str) -> list[bytes]:
        """Lines of one document that SentencePiece takes, without their ends. Counts them."""
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
    """Sources of NAME=PATH or PATH, a file, folder or pattern each; several may go by one NAME.

    Without a NAME the file, the folder or the start of the pattern gives it, and must give it once.
    """
    named = [_split_name(str(argument)) for argument in inputs]
    files = find_inputs([path for _, path in named])
    sources: dict[str, TextSource] = {}
    for name, path in named:
        own = name or _name_of(path)
        if own in sources and not name:
            reason = f"gives a second source the name {own!r}"
            raise ConfigError(Problem("--input", path, reason, "name it: --input NAME=PATH"))
        source = sources.setdefault(own, TextSource(own, []))
        source.files += [file for file in files if file.argument == path]
    return list(sources.values())


def _split_name(argument: str) -> tuple[str, str]:
    match = re.fullmatch(r"([A-Za-z0-9][A-Za-z0-9_.-]*)=(.+)", argument)
    return (match[1], match[2]) if match and not os.path.exists(argument) else ("", argument)


def _name_of(path: str) -> str:
    """data/wiki.jsonl.zst and data/wiki-*.jsonl are wiki; books/ and books/*.txt are books."""
    before_pattern = re.split(r"[*?\[]", path)[0]
    stem = re.sub(r"(\.(jsonl|json|txt|parquet))?(\.(gz|zst))?$", "", Path(before_pattern).name)
    return stem.rstrip("-_.") or "text"


class Corpus:
    """All lines to learn from. With `bytes_per_source`, a uniform sample of the lines of each source.

    Reading refuses text that needs more memory than `memory` allows (PreflightError). With `for_report` each
    source keeps up to 1 MB of its lines, drawn like the training sample from all that was read.
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
        """Of all input files."""
        return sum(file.size for source in self.sources for file in source.files)

    def check_memory_ahead(self) -> None:
        """PreflightError before anything is read, if the sizes of the files are enough to tell.

        What is in a file may be less than its size, but then the budget that the error names costs nothing.
        """
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
            while lines:  # the trainer makes a copy of its own: let go of each line as it goes there
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
        """The usable lines of each document."""
        for_report = Reservoir(REPORT_BYTES, f"report {self._seed} {source.name}")
        for file in source.files:
            for text in read_texts(file, self._json_key, progress):
                lines = source.usable_lines(text)
                if self._for_report:
                    for line in lines:
                        for_report.add(line)
                yield lines
        source.report_sample = for_report.sample()


def read_texts(file: InputFile, json_key: str, progress: ByteProgress) -> Iterator[str]:
    """The documents of one file. Progress counts bytes on disk; inside a compressed file it can but guess."""
    expansion = _expansion(file)
    counted = 0
    for record in read_records([file.path], json_key):
        yield record.text(json_key)
        size = int(record.size / expansion)
        if file.format != "stream":  # whose size is not known
            size = min(size, file.size - counted)
        counted += size
        progress.advance(bytes=size, documents=1)
    progress.advance(bytes=max(file.size - counted, 0), documents=0)


def _expansion(file: InputFile) -> float:
    """Bytes of text in a byte of the file, by its start. What is wrong with the file, reading will tell."""
    if file.format not in ("gzip", "zstd"):
        return 1.0
    with file.path.open("rb") as stream:
        start = stream.read(_START_BYTES)
    decoder: Any = zlib.decompressobj(wbits=31)
    if file.format == "zstd":
        decoder = zstandard.ZstdDecompressor().decompressobj()
    try:
        return max(len(decoder.decompress(start)), 1) / len(start)
    except (zlib.error, zstandard.ZstdError):
        return 1.0
