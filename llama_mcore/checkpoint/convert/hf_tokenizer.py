"""A SentencePiece BPE model in the format of Hugging Face's `tokenizers`.

`transformers` could read tokenizer.model itself, but its LlamaTokenizer drops the leading space of a text
that begins with one and joins the characters of `<s>` in a text to the control token. The file written here
encodes every text as SentencePiece does, and so as the training data was encoded.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor

TOKENIZER_MODEL = "tokenizer.model"
_SPACE = "\u2581"


def write_tokenizer(source: Path, folder: Path, max_length: int) -> None:
    """Copy `source` to `folder` and write tokenizer.json and tokenizer_config.json beside it."""
    model = source.read_bytes()
    processor = SentencePieceProcessor()
    processor.LoadFromSerializedProto(model)
    (folder / TOKENIZER_MODEL).write_bytes(model)
    for name, content in {
        "tokenizer.json": tokenizer_json(processor),
        "tokenizer_config.json": tokenizer_config(processor, max_length),
    }.items():
        (folder / name).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def tokenizer_json(processor: SentencePieceProcessor) -> dict[str, Any]:
    """What `tokenizers.Tokenizer.from_file` reads."""
    pieces = [processor.id_to_piece(index) for index in range(processor.vocab_size())]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_special_token(index, pieces[index]) for index in _special_ids(processor)],
        # SentencePiece's add_dummy_prefix, which Metaspace skips where the text begins with a space
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": _SPACE},
                {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": pieces[processor.unk_id()],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {piece: index for index, piece in enumerate(pieces)},
            "merges": list(_merges(processor)),
        },
    }


def tokenizer_config(processor: SentencePieceProcessor, max_length: int) -> dict[str, Any]:
    """What `transformers.AutoTokenizer` reads. The generic class takes tokenizer.json as it is.

    No BOS is added, since the training data had none.
    """
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": processor.id_to_piece(processor.bos_id()) if processor.bos_id() >= 0 else None,
        "eos_token": processor.id_to_piece(processor.eos_id()),
        "unk_token": processor.id_to_piece(processor.unk_id()),
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,
        "model_max_length": max_length,
    }


def _merges(processor: SentencePieceProcessor) -> Iterator[list[str]]:
    """SentencePiece joins the two neighbours whose joint piece scores best, whichever way it splits.

    Runs of spaces share one score, and there the leftmost neighbours come first; a list cannot tie, but with
    long runs before short ones the leftmost run grows first too.
    Control tokens and bytes take no part: they are never found in a text.
    """
    normal = [index for index in range(processor.vocab_size()) if not _is_reserved(processor, index)]
    known = {processor.id_to_piece(index) for index in normal}

    def best_first(index: int) -> tuple[float, int]:
        return -processor.get_score(index), -len(processor.id_to_piece(index))

    for index in sorted(normal, key=best_first):
        piece = processor.id_to_piece(index)
        for middle in range(1, len(piece)):
            left, right = piece[:middle], piece[middle:]
            if left in known and right in known:
                yield [left, right]


def _is_reserved(processor: SentencePieceProcessor, index: int) -> bool:
    return processor.is_control(index) or processor.is_unknown(index) or processor.is_byte(index)


def _special_ids(processor: SentencePieceProcessor) -> list[int]:
    return [
        index
        for index in range(processor.vocab_size())
        if processor.is_control(index) or processor.is_unknown(index)
    ]


def _special_token(index: int, content: str) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": index, "content": content, **flags}
