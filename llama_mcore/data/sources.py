"""The sources of a run, opened and checked against each other and against the run's tokenizer."""

from dataclasses import dataclass

from llama_mcore.data.config import DataConfig
from llama_mcore.data.dataset import WindowDataset
from llama_mcore.data.ledger import Segment, plan_segment
from llama_mcore.data.tokenizer import Tokenizer
from llama_mcore.errors import DataError, Problem, UserError


@dataclass(frozen=True)
class OpenSource:
    name: str
    train: WindowDataset
    valid: WindowDataset | None


def open_sources(data: DataConfig, seq_length: int, vocab_size: int) -> list[OpenSource]:
    """Open every dataset. Raises one error with the problems of all of them."""
    opened: dict[str, dict[str, WindowDataset | None]] = {}
    failures: list[UserError] = []
    for name, source in data.named_sources.items():
        opened[name] = {"valid": None}
        for split, prefix in (("train", source.train), ("valid", source.valid)):
            if prefix:
                try:
                    opened[name][split] = WindowDataset(prefix, seq_length, vocab_size)
                except UserError as error:
                    failures.append(error)
    if failures:
        raise type(failures[0])([problem for error in failures for problem in error.problems])
    return [OpenSource(name, **splits) for name, splits in opened.items()]  # type: ignore[arg-type]


def plan_run(data: DataConfig, sources: list[OpenSource], seed: int, seq_length: int) -> Segment:
    """The plan of what a run reads. Raises DataError where datasets were made with different tokenizers, or
    with another one than the run's."""
    tokenizer = _check_tokenizers(data, sources)
    datasets = {source.name: source.train for source in sources}
    return plan_segment(data.named_sources, datasets, seed, seq_length, tokenizer)


def _check_tokenizers(data: DataConfig, sources: list[OpenSource]) -> str | None:
    """SHA-256 of the run's tokenizer, or of the one that all data was made with; None if nobody knows."""
    datasets = [dataset for source in sources for dataset in (source.train, source.valid) if dataset]
    made_with = [(dataset.prefix, sha256) for dataset in datasets for sha256 in sorted(dataset.tokenizers)]
    if data.tokenizer:
        expected = Tokenizer(data.tokenizer, "data.tokenizer").sha256
        remedy = f"the run's data.tokenizer = {data.tokenizer} has {expected}"
    else:
        expected = made_with[0][1] if made_with else ""
        remedy = f"{made_with[0][0]} was made with {expected}" if made_with else ""
    problems = [
        Problem("dataset", prefix, f"was made with the tokenizer {sha256}", remedy)
        for prefix, sha256 in made_with
        if sha256 != expected
    ]
    if problems:
        raise DataError(problems)
    return expected or None
