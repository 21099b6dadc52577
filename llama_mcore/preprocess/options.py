"""What a preprocessing job can be told, and the names of what it writes."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from llama_mcore.errors import ConfigError, Problem
from llama_mcore.preprocess.inputs import InputFile
from llama_mcore.preprocess.job import ENCODERS, OnBadLine
from llama_mcore.preprocess.work_queue import Shard

if TYPE_CHECKING:
    from llama_mcore.preprocess.encoders import EncoderName

TOKENIZER_TYPES = ("SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer")
"""Megatron's names for a SentencePiece model. Its older Llama2Tokenizer puts BOS before each document."""


@dataclass(frozen=True)
class Settings:
    """How documents become tokens. `preprocess` takes them by name."""

    json_keys: Sequence[str] = ("text",)
    workers: int = 1
    append_bos: bool = False
    append_eod: bool = False
    encoder: "EncoderName" = "gigatoken"
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


def dataset_prefix(output_prefix: Path | str, key: str) -> str:
    """Megatron's name of the dataset of one key."""
    return f"{output_prefix}_{key}_document"


def validation_prefix(output_prefix: Path | str, key: str) -> str:
    return f"{output_prefix}_{key}_validation"


def output_prefixes(prefix: Path | str, keys: Sequence[str], validation: bool) -> list[str]:
    """The datasets of a job: of each key the documents and, if some are set aside for validation, those."""
    splits = (dataset_prefix, validation_prefix) if validation else (dataset_prefix,)
    return [name(prefix, key) for key in keys for name in splits]


def shard_prefix(output_prefix: Path | str, shard: Shard) -> str:
    """PREFIX_03_of_32: a listing of the folder gives the shards in order."""
    if shard.count == 1:
        return str(output_prefix)
    return f"{output_prefix}_{shard.index:0{len(str(shard.count))}d}_of_{shard.count}"


def parse_shard(text: str) -> Shard:
    """`3/32`, counted from 0. ConfigError for anything else."""
    index, slash, count = text.partition("/")
    if slash and index.isdecimal() and count.isdecimal() and int(index) < int(count):
        return Shard(int(index), int(count))
    raise ConfigError(
        Problem("--shard", text, "must be INDEX/COUNT, counted from 0", "the first of 32 is 0/32")
    )


def check_settings(settings: Settings, shard: Shard, files: Sequence[InputFile]) -> None:
    """ConfigError with everything that is not known, out of range, or does not fit the input."""
    problems = [
        Problem(flag, value, "is not known", f"known: {', '.join(known)}")
        for flag, value, known in (
            ("--encoder", settings.encoder, ENCODERS),
            ("--on-bad-line", settings.on_bad_line, get_args(OnBadLine)),
            ("--tokenizer-type", settings.tokenizer_type or TOKENIZER_TYPES[0], TOKENIZER_TYPES),
        )
        if value not in known
    ]
    if not 0 <= settings.validation_split < 1:
        problems.append(
            Problem("--validation-split", settings.validation_split, "must be at least 0 and below 1")
        )
    if not 0 <= settings.max_bad_ratio <= 1:
        problems.append(Problem("--max-bad-ratio", settings.max_bad_ratio, "must be from 0 to 1"))
    streams = [file.path for file in files if file.format == "stream"]
    if streams and shard.count > 1:
        reason = "cannot be read by several jobs"
        problems.append(Problem("--input", streams[0], reason, "give files, or no --shard"))
    texts = [file.path for file in files if file.format == "text"]
    if texts and len(set(settings.json_keys)) > 1:
        reason = "has one text, not one for each of --json-keys"
        problems.append(Problem("--input", texts[0], reason, "give one key, or JSONL"))
    if problems:
        raise ConfigError(problems)
