"""Settings of the data of a run. Imports no torch."""

from typing import Annotated

from pydantic import BeforeValidator, Field, StringConstraints
from pydantic_core import PydanticCustomError

from llama_mcore.config.section import Section

SourceName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]+$")]


def _check_prefixes(value: object) -> object:
    # pydantic would report an error for each type of the union.
    parts = value if isinstance(value, list) else [value]
    if not parts or not all(isinstance(part, str) for part in parts):
        raise PydanticCustomError("prefixes", "must be a prefix of .bin and .idx, or a list of prefixes")
    return value


Prefixes = Annotated[str | list[str], BeforeValidator(_check_prefixes)]


class SourceConfig(Section):
    """A source of text. Either all sources of a run have `epochs`, or all have `weight`."""

    train: Prefixes
    """Prefix of its training dataset, or prefixes of several datasets that follow each other."""
    valid: str | None = None
    """Prefix of its validation dataset."""
    epochs: float | None = Field(default=None, gt=0)
    """Times that the plan reads each of its windows. The run may be shorter than the plan, never longer."""
    weight: float | None = Field(default=None, gt=0)
    """Its share of the run's samples, in proportion to the other sources' weights."""
    max_epochs: float = Field(default=1.0, gt=0)
    """With `weight`: a run that would read any of its windows more often is refused."""


class DataConfig(Section):
    """Datasets, named by the prefix of their .bin and .idx files as in megatron-core."""

    train: Prefixes | None = None
    """Prefix of the training dataset, for a run with one source; for several see `sources`."""
    valid: str | None = None
    """Prefix of its validation dataset."""
    epochs: float = Field(default=1.0, gt=0)
    """A run that would read any window of `train` more often is refused."""
    sources: dict[SourceName, SourceConfig] = Field(default_factory=dict)
    """Several sources by name, instead of `train`. `mixture: FILE` stands for the sources in that file."""
    tokenizer: str | None = None
    """SentencePiece model that the datasets were made with; exported with the weights."""
    prefetch: int = Field(default=4, ge=1, le=1024)
    """Micro-batches that a background thread reads ahead into memory."""
    eod_token: int = Field(default=2, ge=0)
    """Token that closes a document (EOS of LLaMA's tokenizer)."""
    reset_attention_at_eod: bool = False
    """Keep attention inside its document. In the LLaMA paper it looks back past the start."""
    eod_mask_loss: bool = False
    """Leave the first token of a document, which nothing predicts, out of the loss."""

    @property
    def attention_boundary(self) -> int | None:
        """The token after which attention starts afresh, if there is one."""
        return self.eod_token if self.reset_attention_at_eod else None

    @property
    def masked_token(self) -> int | None:
        """The token whose successor does not count in the loss, if there is one."""
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
