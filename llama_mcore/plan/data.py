"""`plan data`: the text that a mixture must hold to supply a number of tokens. Imports no torch.

    epochs of a source = its share of the samples x tokens of the run / its own tokens

The shares are the mixture's, whatever the budget. Epochs follow from them, and a source that would be read
too often is short of text. Up to four epochs are worth almost as much as new text, and after that repeating
loses its value (Muennighoff et al., "Scaling Data-Constrained Language Models", 2305.16264).
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from llama_mcore.config.load import load_mixture
from llama_mcore.data.config import SourceConfig
from llama_mcore.errors import ConfigError, Problem, nearest
from llama_mcore.plan.arguments import all_of
from llama_mcore.plan.table import Grid, whole
from llama_mcore.units import format_count, parse_count

PAPER_TOKENS = 1.4e12
WORTHWHILE_EPOCHS = 4.0
PREPROCESS_MB_PER_S = 30.0
"""Text that one core tokenizes: half of what two workers are measured at in docs/benchmarks.md."""


@dataclass(frozen=True)
class PaperSource:
    """A row of the LLaMA paper's Table 1."""

    share: float
    epochs: float
    """At 1.4T tokens."""
    text_bytes: float

    @property
    def tokens(self) -> float:
        """Tokens of the text read once, as the other columns imply."""
        return self.share * PAPER_TOKENS / self.epochs


TABLE_1 = {
    "common_crawl": PaperSource(0.670, 1.10, 3.3e12),
    "c4": PaperSource(0.150, 1.06, 783e9),
    "github": PaperSource(0.045, 0.64, 328e9),
    "wikipedia": PaperSource(0.045, 2.45, 83e9),
    "books": PaperSource(0.045, 2.23, 85e9),
    "arxiv": PaperSource(0.025, 1.06, 92e9),
    "stack_exchange": PaperSource(0.020, 1.03, 78e9),
}
_BYTES_PER_TOKEN = sum(row.text_bytes for row in TABLE_1.values()) / sum(
    row.tokens for row in TABLE_1.values()
)


@dataclass(frozen=True)
class SourcePlan:
    """One source under a budget. Counts all its tokens, read or not."""

    name: str
    weight: float
    """Share of the samples."""
    tokens_available: float
    tokens_read: float
    epochs: float
    tokens_short: float
    """New tokens needed to keep its epochs within the limit; 0 if none are."""
    text_bytes: float


@dataclass(frozen=True)
class DataPlan:
    """All sources of a mixture under a budget."""

    tokens: float
    max_epochs: float
    sources: list[SourcePlan]
    preprocess_mb_per_s: float
    cores: int

    @property
    def tokens_available(self) -> float:
        return sum(source.tokens_available for source in self.sources)

    @property
    def text_bytes(self) -> float:
        return sum(source.text_bytes for source in self.sources)

    @property
    def preprocess_hours(self) -> float:
        return self.text_bytes / (self.preprocess_mb_per_s * 1e6 * self.cores) / 3600

    @property
    def tokens_within_limit(self) -> float:
        """Largest budget that keeps every source within the limit."""
        return min(self.max_epochs * source.tokens_available / source.weight for source in self.sources)

    @property
    def conclusion(self) -> str:
        short = [source for source in self.sources if source.tokens_short]
        limit = f"{self.max_epochs:g} epochs"
        if not short:
            most = max(self.sources, key=lambda source: source.epochs)
            return (
                f"{format_count(self.tokens)} tokens: no source is short; "
                f"{most.name} is read most often, {most.epochs:.2f} times (limit {limit})."
            )
        missing = sum(source.tokens_short for source in short)
        return (
            f"{format_count(self.tokens)} tokens: {len(short)} of {len(self.sources)} sources are short, by "
            f"{format_count(missing)} tokens in total; without more text, at most "
            f"{format_count(self.tokens_within_limit)} tokens stay within {limit}."
        )

    def to_dict(self) -> dict[str, Any]:
        return {
            "conclusion": self.conclusion,
            "tokens": self.tokens,
            "max_epochs": self.max_epochs,
            "tokens_available": self.tokens_available,
            "tokens_within_limit": self.tokens_within_limit,
            "sources": [asdict(source) for source in self.sources],
            "text_bytes": self.text_bytes,
            "bin_bytes_uint16": 2 * self.tokens_available,
            "bin_bytes_int32": 4 * self.tokens_available,
            "preprocess_mb_per_s_per_core": self.preprocess_mb_per_s,
            "preprocess_cores": self.cores,
            "preprocess_hours": self.preprocess_hours,
        }

    def parts(self) -> list[str | Grid]:
        """Paragraphs and tables that `plan data` prints."""
        rows = [
            [
                source.name,
                f"{source.weight:.1%}",
                format_count(source.tokens_available),
                format_count(source.tokens_read),
                f"{source.epochs:.2f}",
                format_count(source.tokens_short) if source.tokens_short else "-",
                f"{source.text_bytes / 1e9:,.0f}",
                f"{2 * source.tokens_available / 1e9:,.0f}",
                f"{4 * source.tokens_available / 1e9:,.0f}",
            ]
            for source in self.sources
        ]
        headers = [
            "source",
            "weight",
            "tokens",
            "read",
            "epochs",
            "short",
            "text GB",
            ".bin GB",
            "at 4 bytes",
        ]
        title = f"{format_count(self.tokens)} tokens from {format_count(self.tokens_available)}"
        return [
            self.conclusion,
            Grid(title, headers, rows),
            "\n".join(
                [
                    f"- disk: {self.text_bytes / 1e12:.2f} TB of text and "
                    f"{2 * self.tokens_available / 1e12:.2f} TB of .bin at 2 bytes a token (vocabularies up "
                    "to 65,536), twice that at 4",
                    f"- preprocessing: {whole(self.preprocess_hours)} hours; cores: {self.cores:,}, at "
                    f"{self.preprocess_mb_per_s:g} MB/s each",
                    f"- Beyond {WORTHWHILE_EPOCHS:g} epochs of a source, repeating it loses its value "
                    "(Muennighoff et al. 2305.16264).",
                ]
            ),
        ]


def plan_data(
    tokens: str,
    mixture: str = "mixture_llama1",
    available: Sequence[str] = (),
    max_epochs: str = "4",
    mb_per_s: str = "30",
    cores: str = "1",
) -> DataPlan:
    """The mixture scaled to a budget. Numbers are text such as 1.4T, `available` is NAME=TOKENS.

    Raises ConfigError with every problem, MissingInputError for a mixture that does not exist.
    """
    sources = load_mixture(mixture, "--mixture")
    budget, limit, speed, workers, given = all_of(
        lambda: parse_count("--tokens", tokens, 1, 1e18),
        lambda: parse_count("--max-epochs", max_epochs, 0.01, 1e6),
        lambda: parse_count("--preprocess-mb-per-s", mb_per_s, 1e-3, 1e6),
        lambda: int(parse_count("--cores", cores, 1, 1e7, whole=True)),
        lambda: _available(available, sources),
    )
    return DataPlan(budget, limit, _scaled(sources, given, budget, limit), speed, workers)


def table_1_plan(tokens: float) -> DataPlan:
    """The paper's own mixture under another budget."""
    sources = {name: SourceConfig(train=name, epochs=row.epochs) for name, row in TABLE_1.items()}
    plans = _scaled(sources, {}, tokens, WORTHWHILE_EPOCHS)
    return DataPlan(tokens, WORTHWHILE_EPOCHS, plans, PREPROCESS_MB_PER_S, 1)


def _scaled(
    sources: Mapping[str, SourceConfig], given: Mapping[str, float], tokens: float, limit: float
) -> list[SourcePlan]:
    weights = {name: _weight(name, source, given) for name, source in sources.items()}
    total = sum(weights.values())
    plans = []
    for name, weight in weights.items():
        available = given.get(name) or TABLE_1[name].tokens
        read = weight / total * tokens
        paper = TABLE_1.get(name)
        bytes_per_token = paper.text_bytes / paper.tokens if paper else _BYTES_PER_TOKEN
        plans.append(
            SourcePlan(
                name=name,
                weight=weight / total,
                tokens_available=available,
                tokens_read=read,
                epochs=read / available,
                tokens_short=max(0.0, read / limit - available),
                text_bytes=available * bytes_per_token,
            )
        )
    return plans


def _weight(name: str, source: SourceConfig, given: Mapping[str, float]) -> float:
    """A source's relative share of the samples: its weight, or its epochs times the paper's tokens of it."""
    if source.weight is not None:
        return source.weight
    size = TABLE_1[name].tokens if name in TABLE_1 else given[name]
    return (source.epochs or 1.0) * size


def _available(texts: Sequence[str], sources: Mapping[str, SourceConfig]) -> dict[str, float]:
    """Tokens by source, from NAME=TOKENS. Raises ConfigError with every problem."""
    found: dict[str, float] = {}
    problems = []
    for text in texts:
        name, equals, count = text.partition("=")
        if not equals or name not in sources:
            reason = "must be NAME=TOKENS for a source of the mixture"
            problems.append(Problem("--tokens-available", text, reason, nearest(name, sources)))
        elif name in found:
            problems.append(Problem("--tokens-available", text, "repeats a source", "give each source once"))
        else:
            found[name] = 0.0
            try:
                found[name] = parse_count(f"--tokens-available {name}", count, 1, 1e18)
            except ConfigError as error:
                problems += error.problems
    problems += [
        Problem(
            "--tokens-available",
            f"(not given for {name})",
            "is required for a source that is not in the paper's Table 1",
            f"add --tokens-available {name}=TOKENS",
        )
        for name in sources
        if name not in TABLE_1 and name not in found
    ]
    if problems:
        raise ConfigError(problems)
    return found
