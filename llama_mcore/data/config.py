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
    eod_token: int = Field(default=2, ge=0)
    """Token that closes a document (EOS of LLaMA's tokenizer)."""
    reset_attention_at_eod: bool = False
    """Attention does not look back past the start of its document. The paper's does."""

    @property
    def attention_boundary(self) -> int | None:
        """The token at which attention starts anew, if at any."""
        return self.eod_token if self.reset_attention_at_eod else None
