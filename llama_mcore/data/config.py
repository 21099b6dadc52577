"""What a run reads. Pure Python."""

from pydantic import Field

from llama_mcore.section import Section


class DataConfig(Section):
    """Datasets are named by the prefix of their .bin and .idx files, as in megatron-core."""

    train: str
    """Prefix of the training dataset."""
    valid: str | None = None
    """Prefix of the held-out dataset."""
    tokenizer: str | None = None
    """SentencePiece model that the datasets were made with; exported beside the weights."""
    prefetch: int = Field(default=4, ge=1)
    """Micro-batches that a background thread prepares ahead."""
