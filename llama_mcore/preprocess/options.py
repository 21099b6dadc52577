"""Settings of a preprocessing job, the names of its outputs, and what its workers need to know."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from llama_mcore.data.index import bin_path, idx_path
from llama_mcore.data.manifest import manifest_path
from llama_mcore.errors import ConfigError, Problem
from llama_mcore.preprocess.inputs import FileGroup, InputFile
from llama_mcore.preprocess.part_store import PartsFolder
from llama_mcore.preprocess.work_queue import Shard

EncoderName = Literal["gigatoken", "sentencepiece"]
OnBadLine = Literal["fail", "skip"]
TOKENIZER_TYPES = ("SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer")
"""Megatron's names for a SentencePiece model. Its older Llama2Tokenizer puts BOS before each document."""


@dataclass(frozen=True)
class Settings:
    """Options of `preprocess`."""

    json_keys: Sequence[str] = ("text",)
    workers: int = 1
    append_bos: bool = False
    append_eod: bool = False
    encoder: EncoderName = "gigatoken"
    on_bad_line: OnBadLine = "fail"
    max_bad_ratio: float = 0.01
    validation_split: float = 0.0
    """Share of the documents that goes to PREFIX_KEY_validation instead."""
    shard: str = "0/1"
    """INDEX/COUNT, counted from 0: see `parse_shard`."""
    shuffle_seed: int | None = None
    restart: bool = False
    force: bool = False
    """Replace datasets that another job has made."""
    tokenizer_type: str = ""
    """One of TOKENIZER_TYPES, which are all the same here."""

    @property
    def keys(self) -> list[str]:
        """The JSON keys, each once."""
        return list(dict.fromkeys(self.json_keys))


@dataclass(frozen=True)
class EncodeSpec:
    """Everything that a worker needs to know to turn units into parts."""

    groups: Sequence[FileGroup]
    unit_bytes: int
    parts: PartsFolder
    tokenizer_model: Path
    encoder: EncoderName
    keys: Sequence[str]
    vocab_size: int
    dtype: type[np.integer]
    bos: int | None
    eod: int | None
    validation_split: float
    on_bad_line: OnBadLine
    shuffle_seed: int | None

    @property
    def outputs_per_key(self) -> int:
        """Datasets of each key: its documents and, if some are set aside for validation, those."""
        return 2 if self.validation_split else 1


class Outputs:
    """Names of everything that a job writes."""

    def __init__(self, output_prefix: Path | str, settings: Settings, shard: Shard) -> None:
        prefix = str(output_prefix)
        if shard.count > 1:  # zeros in front: a listing of the folder gives the shards in order
            prefix += f"_{shard.index:0{len(str(shard.count))}d}_of_{shard.count}"
        self.parts_folder = Path(f"{prefix}.parts")
        self.quarantine = Path(f"{prefix}.quarantine.jsonl")
        splits = ("document", "validation")
        every = [f"{prefix}_{key}_{split}" for key in settings.keys for split in splits]
        self.datasets = every if settings.validation_split else every[::2]
        """Prefixes of its datasets, in Megatron's words: key by key, documents before validation."""
        self.unused = [] if settings.validation_split else every[1::2]
        """Prefixes of the datasets that the job would write with other options."""

    @property
    def files(self) -> list[Path]:
        datasets = [path(prefix) for prefix in self.datasets for path in (bin_path, idx_path, manifest_path)]
        return [*datasets, self.quarantine]


def parse_shard(text: str) -> Shard:
    """Shard of `3/32`, counted from 0. Raises ConfigError for anything else."""
    index, slash, count = text.partition("/")
    if slash and index.isdecimal() and count.isdecimal() and int(index) < int(count):
        return Shard(int(index), int(count))
    raise ConfigError(
        Problem("--shard", text, "must be INDEX/COUNT, counted from 0", "the first of 32 is 0/32")
    )


def check_settings(settings: Settings, shard: Shard, files: Sequence[InputFile]) -> None:
    """Raise ConfigError with every setting that is unknown, out of range, or does not fit the input."""
    problems = [
        Problem(flag, value, "is unknown", f"known: {', '.join(known)}")
        for flag, value, known in (
            ("--encoder", settings.encoder, get_args(EncoderName)),
            ("--on-bad-line", settings.on_bad_line, get_args(OnBadLine)),
            ("--tokenizer-type", settings.tokenizer_type or TOKENIZER_TYPES[0], TOKENIZER_TYPES),
        )
        if value not in known
    ]
    if not 0 <= settings.validation_split < 1:
        reason = "must be at least 0 and below 1"
        problems.append(Problem("--validation-split", settings.validation_split, reason))
    if not 0 <= settings.max_bad_ratio <= 1:
        problems.append(Problem("--max-bad-ratio", settings.max_bad_ratio, "must be from 0 to 1"))
    streams = [file.path for file in files if file.format == "stream"]
    if streams and shard.count > 1:
        reason = "is a stream, which several jobs cannot share"
        problems.append(Problem("--input", streams[0], reason, "give files, or drop --shard"))
    texts = [file.path for file in files if file.format == "text"]
    if texts and len(settings.keys) > 1:
        reason = "is a text file: it has one text, not one for each of --json-keys"
        problems.append(Problem("--input", texts[0], reason, "give one key, or JSONL"))
    if problems:
        raise ConfigError(problems)
