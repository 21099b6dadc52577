"""SentencePiece tokenizer: text to token ids and back."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import sentencepiece

from llama_mcore.errors import DataError, MissingInputError, Problem, input_problem, shown
from llama_mcore.small_file import read_small_file

LARGEST_MODEL = 64 << 20
"""Bytes; LLaMA's has half a million."""
_REMEDY = "give the tokenizer.model that train-tokenizer wrote"


class Tokenizer:
    """Tokenizer of a SentencePiece model.

    Text never becomes a control token: `<s>` in it is three characters.
    decode(encode(text)) == text, with one exception that the format has: U+2581, SentencePiece's own mark for
    a space, comes back as a space.
    """

    def __init__(self, path: Path | str, field: str = "tokenizer") -> None:
        """Load a model, called `field` in errors: MissingInputError, or DataError if it is not one."""
        self.path, self._field = Path(path), field
        try:
            self.model = read_small_file(self.path, LARGEST_MODEL, follow=True)
        except OSError as error:
            raise MissingInputError(
                input_problem(field, path, "check the path, or train one with train-tokenizer", error)
            ) from None
        except ValueError as error:
            raise DataError(Problem(field, path, f"cannot be read ({shown(error)})", _REMEDY)) from None
        self.sha256 = hashlib.sha256(self.model).hexdigest()
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(self.model)
        except RuntimeError:
            raise self._not_a_model() from None
        if self._processor.eos_id() < 0:
            raise self._not_a_model()

    def _not_a_model(self) -> DataError:
        reason = "is not a SentencePiece model with an end-of-sequence token"
        return DataError(Problem(self._field, self.path, reason, _REMEDY))

    @property
    def vocab_size(self) -> int:
        return int(self._processor.vocab_size())

    @property
    def bos(self) -> int:
        return int(self._processor.bos_id())

    @property
    def eod(self) -> int:
        """The token that ends a document: LLaMA's end-of-sequence token."""
        return int(self._processor.eos_id())

    def encode(self, text: str) -> list[int]:
        """Ids of the text alone, without BOS and EOS; none for the empty text."""
        return list(self._processor.encode(text))

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids; control tokens leave no trace."""
        return str(self._processor.decode(list(ids)))
