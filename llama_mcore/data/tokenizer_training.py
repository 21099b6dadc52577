"""Training of a SentencePiece BPE tokenizer with the settings of the released LLaMA tokenizer."""

import hashlib
import re
import sys
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import sentencepiece

from llama_mcore.data.files import output_errors, prepare_output, published
from llama_mcore.data.progress import InputProgress
from llama_mcore.data.readers import check_inputs, read_records
from llama_mcore.errors import DataError, Problem

# The trainer_spec and normalizer_spec inside the tokenizer.model that Meta released with LLaMA. num_threads
# stays at SentencePiece's default: the model stores it, and would otherwise differ from machine to machine.
LLAMA_TRAINER: dict[str, Any] = {
    "model_type": "bpe",
    "character_coverage": 0.99995,
    "input_sentence_size": 200_000_000,
    "shuffle_input_sentence": True,
    "max_sentence_length": 4192,
    "max_sentencepiece_length": 16,
    "split_by_unicode_script": True,
    "split_by_whitespace": True,
    "split_by_number": True,
    "split_digits": True,
    "allow_whitespace_only_pieces": True,
    "byte_fallback": True,
    "normalization_rule_name": "identity",
    "add_dummy_prefix": True,
    "remove_extra_whitespaces": False,
    "unk_id": 0,
    "bos_id": 1,
    "eos_id": 2,
    "pad_id": -1,
}
# SentencePiece shuffles, and samples beyond input_sentence_size, with a generator of its own.
_SAMPLING_SEED = 1
_LOG_ERRORS_ONLY = 2


def train_tokenizer(inputs: Sequence[Path], output: Path, *, vocab_size: int, json_key: str = "text") -> None:
    """Train on the lines of all documents and write the model to `output`.

    The same inputs give the same bytes. Lines over 4,192 bytes are left out, as in LLaMA's own training.
    """
    total_bytes = check_inputs(inputs)
    prepare_output(output)
    with InputProgress("train-tokenizer", total_bytes) as progress:
        sentences = _Sentences(inputs, json_key, progress)
        model = _train(sentences, vocab_size)
        with published(output) as temporary, output_errors(output):
            temporary.write_bytes(model)
    digest = hashlib.sha256(model).hexdigest()
    print(
        f"{output}: vocabulary {vocab_size:,} from {progress.documents:,} documents "
        f"({total_bytes / 1e6:,.1f} MB) in {progress.seconds:.1f} s, SHA-256 {digest}",
        flush=True,
    )


class _Sentences:
    """The non-empty lines of all documents.

    SentencePiece turns an exception of its iterator into a RuntimeError; `error` keeps the original.
    """

    def __init__(self, inputs: Sequence[Path], json_key: str, progress: InputProgress) -> None:
        self.error: BaseException | None = None
        self._inputs = inputs
        self._json_key = json_key
        self._progress = progress

    def __iter__(self) -> Iterator[str]:
        try:
            for record in read_records(self._inputs):
                yield from filter(None, record.text(self._json_key).split("\n"))
                self._progress.advance(bytes=record.size, documents=1)
        except (Exception, KeyboardInterrupt) as error:
            self.error = error
            raise
        print("train-tokenizer: text read, learning the merges", file=sys.stderr, flush=True)


def _train(sentences: _Sentences, vocab_size: int) -> bytes:
    sentencepiece.set_random_generator_seed(_SAMPLING_SEED)
    model = BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=model,
            vocab_size=vocab_size,
            minloglevel=_LOG_ERRORS_ONLY,
            **LLAMA_TRAINER,
        )
    except RuntimeError as error:
        raise sentences.error or _training_error(str(error), vocab_size) from None
    return model.getvalue()


def _training_error(message: str, vocab_size: int) -> DataError:
    if match := re.search(r"Vocabulary size too high .* value <= (\d+)", message):
        most = match[1]
        bound = f"is more than the corpus supports: at most {most}"
        return DataError(Problem("vocab_size", vocab_size, bound, f"give more text or --vocab-size {most}"))
    if match := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        bound = f"must be at least {match[1]}: control tokens, 256 bytes and the corpus's own characters"
        return DataError(Problem("vocab_size", vocab_size, bound, f"give --vocab-size {match[1]} or more"))
    if "!sentences_.empty()" in message:
        longest = LLAMA_TRAINER["max_sentence_length"]
        bound = f"hold no line of text of at most {longest} bytes"
        return DataError(Problem("input", "all documents", bound, "give text with shorter lines"))
    return DataError(
        Problem("input", "all documents", f"SentencePiece cannot train on them ({message.strip()})")
    )
