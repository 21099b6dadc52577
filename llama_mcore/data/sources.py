"""Sources of a run, opened and checked against each other and against the run's tokenizer."""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from llama_mcore.data.config import DataConfig
from llama_mcore.data.data_plan import Segment, plan_segment
from llama_mcore.data.index import missing_dataset
from llama_mcore.data.indexed_dataset import IndexedDataset
from llama_mcore.data.manifest import DatasetManifest
from llama_mcore.data.tokenizer import Tokenizer
from llama_mcore.data.windows import WindowDataset
from llama_mcore.errors import (
    DataError,
    LlamaMcoreError,
    MissingInputError,
    Problem,
    gathering,
    input_problem,
    raise_all,
)

_DEMO = "runs/demo/"
"""Folder of the data of the configuration `tiny`."""
_MOST_NAMED = 4
_WEIGHT = re.compile(r"\d*\.?\d+")


@dataclass(frozen=True)
class OpenSource:
    name: str
    train: WindowDataset
    valid: WindowDataset | None


def missing_inputs(data: DataConfig) -> list[Problem]:
    """Problems of missing datasets and of a missing tokenizer, under the settings that name them."""
    problems = [_missing(setting, prefix) for setting, prefix in _prefixes(data)]
    if data.tokenizer and not os.path.isfile(data.tokenizer):
        remedy = (
            "give the tokenizer that the data was made with, or train one with llama-mcore train-tokenizer"
        )
        problems.append(input_problem("data.tokenizer", data.tokenizer, remedy))
    found = [problem for problem in problems if problem]
    if found and all(str(problem.value).startswith(_DEMO) for problem in found):
        reason = f"{len(found)} of the inputs that `make demo` makes are missing"
        remedy = "run `make demo` in the checkout, or name your own data (docs/data.md)"
        return [Problem("data", _DEMO, reason, remedy)]
    if len(found) > _MOST_NAMED:
        first = ", ".join(f"{problem.field} {problem.value}" for problem in found[:_MOST_NAMED])
        remedy = "make them (docs/data.md), or set data.*; `llama-mcore slurm` has --data-later"
        return [Problem("data", f"{first} ...", f"{len(found)} inputs are missing", remedy)]
    return found


def open_sources(data: DataConfig, seq_length: int, vocab_size: int) -> list[OpenSource]:
    """Open every dataset, or raise one error with the problems of all of them."""
    if missing := missing_inputs(data):
        raise MissingInputError(missing)
    opened: dict[str, dict[str, WindowDataset | None]] = {}
    failures: list[LlamaMcoreError] = []
    for name, source in data.named_sources.items():
        opened[name] = {"valid": None}
        for split, prefix in (("train", source.train), ("valid", source.valid)):
            with gathering(failures):
                opened[name][split] = WindowDataset(prefix, seq_length, vocab_size) if prefix else None
    raise_all(failures)
    return [OpenSource(name, **splits) for name, splits in opened.items()]  # type: ignore[arg-type]


def plan_run(data: DataConfig, sources: list[OpenSource], seed: int, seq_length: int) -> Segment:
    """Plan of the windows that a run reads.

    Raises DataError if datasets were made with different tokenizers, or with another one than the run's, or
    if validation documents are trained on.
    """
    errors: list[LlamaMcoreError] = []
    tokenizer = None
    with gathering(errors):
        tokenizer = _check_tokenizers(data, sources)
    with gathering(errors):
        _check_validation(sources)
    raise_all(errors)
    datasets = {source.name: source.train for source in sources}
    return plan_segment(data.named_sources, datasets, seed, seq_length, tokenizer)


def _prefixes(data: DataConfig) -> Iterator[tuple[str, str]]:
    """The setting and the prefix of every dataset."""
    for name, source in data.named_sources.items():
        where = "data" if data.train is not None else f"data.sources.{name}"
        for split, given in (("train", source.train), ("valid", source.valid or [])):
            for prefix in [given] if isinstance(given, str) else given:
                yield f"{where}.{split}", prefix


def _missing(setting: str, prefix: str) -> Problem | None:
    problem = missing_dataset(setting, prefix)
    if problem and _WEIGHT.fullmatch(prefix.partition(" ")[0]):
        reason = "is Megatron's notation for weighted datasets"
        remedy = "write data.sources: {a: {train: PREFIX, weight: 0.3}, b: {train: PREFIX, weight: 0.7}}"
        return Problem(setting, prefix, reason, remedy)
    return problem


def _check_tokenizers(data: DataConfig, sources: list[OpenSource]) -> str | None:
    """SHA-256 of the run's tokenizer, else of the one that all data was made with; None if unknown."""
    datasets = [dataset for source in sources for dataset in (source.train, source.valid) if dataset]
    made = [
        (part.prefix, part.manifest)
        for dataset in datasets
        for part in dataset.datasets
        if part.manifest and part.manifest.tokenizer_sha256
    ]
    if not data.tokenizer:
        return _one_tokenizer(made)
    tokenizer = Tokenizer(data.tokenizer, "data.tokenizer")
    others: dict[str, list[str]] = {}
    for prefix, manifest in made:
        if manifest.tokenizer_sha256 != tokenizer.sha256:
            others.setdefault(manifest.made_with, []).append(prefix)
    if others:
        known = f"SHA-256 {tokenizer.sha256[:12]}"
        raise DataError(
            [
                Problem(
                    "data.tokenizer",
                    data.tokenizer,
                    f"({known}) is not the tokenizer of {', '.join(prefixes)}",
                    f"give {made_with}, or make the data again",
                )
                for made_with, prefixes in others.items()
            ]
        )
    return tokenizer.sha256


def _one_tokenizer(made: list[tuple[str, DatasetManifest]]) -> str | None:
    if not made:
        return None
    (first, expected), *others = made
    remedy = "make all data with one tokenizer"
    problems = [
        Problem(
            "dataset",
            prefix,
            f"was made with the tokenizer {manifest.made_with}, {first} with {expected.made_with}",
            remedy,
        )
        for prefix, manifest in others
        if manifest.tokenizer_sha256 != expected.tokenizer_sha256
    ]
    if problems:
        raise DataError(problems)
    return expected.tokenizer_sha256


def _check_validation(sources: list[OpenSource]) -> None:
    """Raise DataError for validation sets that overlap the training sets, as far as manifests tell."""
    train = [dataset for source in sources for dataset in source.train.datasets]
    valid = [dataset for source in sources if source.valid for dataset in source.valid.datasets]
    remedy = "make both with one call of tools/preprocess_data.py --validation-split"
    problems = [
        Problem("dataset", validation.prefix, reason, remedy)
        for training, validation in product(train, valid)
        if (reason := _why_not_split_off(training, validation))
    ]
    if problems:
        raise DataError(problems)


def _why_not_split_off(train: IndexedDataset, validation: IndexedDataset) -> str:
    """The reason why `validation` was not split off `train`; empty for other text, or if unknown."""
    of_train, of_validation = train.manifest, validation.manifest
    if not of_train or not of_validation or not of_train.files & of_validation.files:
        return ""
    trained, kept = of_train.options, of_validation.options
    if trained.get("json_key") != kept.get("json_key"):
        return ""
    for option in ("append_bos", "append_eod"):
        if option in trained and trained[option] != kept.get(option, trained[option]):
            return f"was made with {option} {kept[option]}, but {train.prefix} with {trained[option]}"
    if kept.get("split") != "validation":
        return ""
    # Documents are set aside by their own text, so that a smaller share is part of a larger one.
    if trained.get("split") == "validation" or of_train.validation_split < of_validation.validation_split:
        return f"holds documents that are also in {train.prefix}"
    return ""
