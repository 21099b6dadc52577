"""What every worker of a preprocessing job is told. Imports no encoder: the parent needs none."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from llama_mcore.preprocess.inputs import Source
from llama_mcore.preprocess.part_store import PartsFolder

if TYPE_CHECKING:
    from llama_mcore.preprocess.encoders import EncoderName

ENCODERS = ("gigatoken", "sentencepiece")
OnBadLine = Literal["fail", "skip"]


@dataclass(frozen=True)
class Job:
    """What every worker is told."""

    sources: Sequence[Source]
    unit_bytes: int
    parts: PartsFolder
    tokenizer_model: Path
    encoder: "EncoderName"
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
        """The documents and, where some are set aside for validation, those."""
        return 2 if self.validation_split else 1
