"""What a run reads, and how often. Imports no torch."""

from typing import Annotated

from pydantic import BeforeValidator, Field, StringConstraints
from pydantic_core import PydanticCustomError

from llama_mcore.config.section import Section

SourceName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]+$")]


def _check_prefixes(value: object) -> object:
    """One message, where pydantic has one for each kind of a union."""
    parts = value if isinstance(value, list) else [value]
    if not parts or not all(isinstance(part, str) for part in parts):
        raise PydanticCustomError("prefixes", "must be a prefix of .bin and .idx, or a list of prefixes")
    return value


Prefixes = Annotated[str | list[str], BeforeValidator(_check_prefixes)]


class SourceConfig(Section):
    """One source of text. All sources of a run give `epochs`, or all give `weight`."""

    train: Prefixes
    """Prefix of its training dataset, or prefixes of the parts that it comes in."""
    valid: str | None = None
    """Prefix of its validation dataset."""
    epochs: float | None = Field(default=None, gt=0)
    """How often the plan reads each of its windows. The run may be shorter than the plan, never longer."""
    weight: float | None = Field(default=None, gt=0)
    """Its share of the run's samples, in proportion to the other sources' weights."""
    max_epochs: float = Field(default=1.0, gt=0)
    """With `weight`: a run that would read any window more often is refused."""


class DataConfig(Section):
    """Datasets are named by the prefix of their .bin and .idx files, as in megatron-core."""

    train: Prefixes | None = None
    """Prefix of the training dataset of a run with one source; else see `sources`."""
    valid: str | None = None
    """Prefix of its validation dataset."""
    epochs: float = Field(default=1.0, gt=0)
    """A run that would read any window of `train` more often is refused."""
    sources: dict[SourceName, SourceConfig] = Field(default_factory=dict)
    """Several sources by name, in place of `train`. `mixture: FILE` stands for the sources of that file."""
    tokenizer: str | None = None
    """SentencePiece model that the datasets were made with; exported beside the weights."""
    prefetch: int = Field(default=4, ge=1, le=1024)
    """Micro-batches that a background thread prepares ahead. They lie in memory, hence a bound."""
    eod_token: int = Field(default=2, ge=0)
    """Token that closes a document (EOS of LLaMA's tokenizer)."""
    reset_attention_at_eod: bool = False
    """Attention does not look back past the start of its document. The paper's does."""
    eod_mask_loss: bool = False
    """The first token of a document, which nothing foretells, does not count in the loss."""

    @property
    def attention_boundary(self) -> int | None:
        """The token at which attention starts anew, if at any."""
        return self.eod_token if self.reset_attention_at_eod else None

    @property
    def masked_token(self) -> int | None:
        """The token whose successor does not count in the loss, if any."""
        return self.eod_token if self.eod_mask_loss else None

    @property
    def named_sources(self) -> dict[str, SourceConfig]:
        """Every source by its name, the only one of a run with `train` included."""
        if self.train is None:
            return self.sources
        return {"train": SourceConfig(train=self.train, valid=self.valid, epochs=self.epochs)}

    @property
    def has_validation(self) -> bool:
        return any(source.valid for source in self.named_sources.values())
