"""Conversion of a SentencePiece BPE model to the format of Hugging Face's `tokenizers`.

`transformers` could read tokenizer.model itself, but its LlamaTokenizer drops the leading space of a text.
The file written here encodes every text as SentencePiece does, and so as the training data was encoded, with
one difference: a control token that is spelled out in a text, such as `</s>`, becomes that token, and the
rest is encoded as a separate text, as documents follow each other in the training stream. With
`split_special_tokens=True` it is characters here too.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

from sentencepiece import SentencePieceProcessor
from sentencepiece import sentencepiece_model_pb2 as model_pb2

from llama_mcore.convert.folder import TOKENIZER_MODEL
from llama_mcore.data.tokenizer import Tokenizer
from llama_mcore.errors import ConfigError, Problem, shown

_SPACE = "\u2581"
_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")
_MOST_LISTED = 3
_REMEDY = "convert to meta, which keeps tokenizer.model as it is"


def tokenizer_files(tokenizer: Tokenizer, max_length: int) -> dict[str, bytes]:
    """tokenizer.model as it is, and the files that `AutoTokenizer` reads. Raises ConfigError for rules of the
    model that tokenizer.json cannot express."""
    model = tokenizer.path.read_bytes()
    config = tokenizer_config(tokenizer, max_length)
    content = {
        "tokenizer.json": tokenizer_json(model),
        "tokenizer_config.json": config,
        # transformers prefers it to tokenizer_config.json: one left by the source would change special tokens
        "special_tokens_map.json": {name: config[name] for name in _SPECIAL},
    }
    texts = {name: json.dumps(each, indent=1, ensure_ascii=False) + "\n" for name, each in content.items()}
    return {TOKENIZER_MODEL: model} | {name: text.encode() for name, text in texts.items()}


def tokenizer_json(model: bytes) -> dict[str, Any]:
    """Content of tokenizer.json. Raises ConfigError for rules that it cannot express."""
    proto = model_pb2.ModelProto.FromString(model)
    if problems := _inexpressible(proto):
        raise ConfigError(problems)
    processor = processor_of(model)
    pieces = [piece.piece for piece in proto.pieces]
    defined = _user_defined(proto)
    special = [
        index for index, piece in enumerate(proto.pieces) if piece.type in (piece.CONTROL, piece.UNKNOWN)
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_special_token(index, pieces[index]) for index in special],
        "normalizer": _normalizer(proto.normalizer_spec),
        "pre_tokenizer": _pre_tokenizer(defined, _reserved(proto)) if defined else None,
        "post_processor": None,
        "decoder": _decoder(proto.normalizer_spec),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": pieces[processor.unk_id()],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            # a user-defined piece that was split off is one token, whatever its characters would merge to
            "ignore_merges": bool(defined),
            "vocab": {piece: index for index, piece in enumerate(pieces)},
            "merges": list(_merges(proto)),
        },
    }


def tokenizer_config(tokenizer: Tokenizer, max_length: int) -> dict[str, Any]:
    """Content of tokenizer_config.json. Its generic class uses tokenizer.json as it is.

    No BOS is added, since the training data had none.
    """
    processor = processor_of(tokenizer.path.read_bytes())
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": processor.id_to_piece(processor.bos_id()) if processor.bos_id() >= 0 else None,
        "eos_token": processor.id_to_piece(processor.eos_id()),
        "unk_token": processor.id_to_piece(processor.unk_id()),
        "pad_token": processor.id_to_piece(pad_id(tokenizer)),
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
    }


def processor_of(model: bytes) -> SentencePieceProcessor:
    processor = SentencePieceProcessor()
    processor.LoadFromSerializedProto(model)
    return processor


def pad_id(tokenizer: Tokenizer) -> int:
    """The model's padding token, else its unknown token, which no text needs where bytes are pieces.

    EOS would not do: fine-tuning leaves padding out of the loss, and the model would never learn to stop.
    """
    processor = processor_of(tokenizer.path.read_bytes())
    return int(processor.pad_id() if processor.pad_id() >= 0 else processor.unk_id())


def _inexpressible(proto: Any) -> list[Problem]:
    trainer, normalizer, denormalizer = proto.trainer_spec, proto.normalizer_spec, proto.denormalizer_spec
    unused = [piece.piece for piece in proto.pieces if piece.type == piece.UNUSED]
    kind = trainer.ModelType.Name(trainer.model_type)
    refused = {
        "model_type": kind if kind != "BPE" else None,
        "normalization rule": normalizer.name if normalizer.precompiled_charsmap else None,
        "denormalization rule": denormalizer.name if denormalizer.precompiled_charsmap else None,
        "escape_whitespaces": None if normalizer.escape_whitespaces else False,
        "treat_whitespace_as_suffix": True if trainer.treat_whitespace_as_suffix else None,
        "unused pieces": ", ".join(unused[:_MOST_LISTED]) or None,
    }
    reason = "cannot be expressed in tokenizer.json"
    problems = [
        Problem(f"tokenizer: {rule}", shown(value), reason, _REMEDY)
        for rule, value in refused.items()
        if value is not None
    ]
    return problems or _ambiguous(proto)


def _ambiguous(proto: Any) -> list[Problem]:
    """Pieces that SentencePiece does not encode as themselves, as after a change of scores. Beside
    user-defined pieces, tokenizer.json encodes any stretch of text that is a piece as that piece."""
    symbols = _user_defined(proto)
    if not symbols:
        return []
    bare = model_pb2.ModelProto.FromString(proto.SerializeToString())
    bare.normalizer_spec.add_dummy_prefix = bare.normalizer_spec.remove_extra_whitespaces = False
    encode = processor_of(bare.SerializeToString()).encode
    found, is_split = re.compile(_any_of(symbols)), set(_reserved(proto))
    amiss = [
        piece.piece
        for index, piece in enumerate(proto.pieces)
        if not found.search(piece.piece)
        and encode(piece.piece)
        != ([*encode(piece.piece[0]), *encode(piece.piece[1:])] if piece.piece in is_split else [index])
    ]
    reason = (
        "is not the encoding of its own text, which tokenizer.json cannot express beside user-defined pieces"
    )
    return [Problem("tokenizer: piece", shown(piece), reason, _REMEDY) for piece in amiss[:_MOST_LISTED]]


def _user_defined(proto: Any) -> list[str]:
    """User-defined pieces, the longest first: of several that match, SentencePiece takes that."""
    found = [piece.piece for piece in proto.pieces if piece.type == piece.USER_DEFINED]
    return sorted(found, key=len, reverse=True)


def _reserved(proto: Any) -> list[str]:
    """Pieces that no text is encoded to, even if it spells them: control tokens, bytes, the unknown token."""
    return [piece.piece for piece in proto.pieces if piece.type in (piece.CONTROL, piece.BYTE, piece.UNKNOWN)]


def _any_of(texts: list[str]) -> str:
    return "|".join(map(re.escape, texts))


def _pre_tokenizer(symbols: list[str], reserved: list[str]) -> dict[str, Any]:
    """Pre-tokenizer that splits off user-defined pieces.

    Added tokens of `tokenizers` would not do: they are found before the normalizer runs, and a text that
    begins with one would lose the space that SentencePiece puts first. The first character of a stretch that
    spells a reserved piece is split off, or it would become that piece.
    """
    spelled = "|".join(f"{re.escape(name[0])}(?={re.escape(name[1:])}\\z)" for name in reserved)
    return {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
            for pattern in (_any_of(symbols), f"\\A(?:{spelled})")
        ],
    }


def _normalizer(rules: Any) -> dict[str, Any]:
    """SentencePiece's rules in its order. Metaspace would put no space before a text that begins with one."""
    prefix, collapse = rules.add_dummy_prefix, rules.remove_extra_whitespaces
    steps = [
        _replace({"Regex": "\\A +"}, "") if collapse else None,
        _replace({"Regex": " {2,}"}, " ") if collapse else None,
        {"type": "Prepend", "prepend": _SPACE} if prefix else None,
        _replace({"String": " "}, _SPACE),
        _replace({"Regex": f"{_SPACE}+\\z"}, "") if collapse else None,
    ]
    return {"type": "Sequence", "normalizers": [step for step in steps if step]}


def _decoder(rules: Any) -> dict[str, Any]:
    steps: list[dict[str, Any]] = [
        _replace({"String": _SPACE}, " "),
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if rules.remove_extra_whitespaces:
        steps.append(_replace({"Regex": "\\A +"}, ""))
    elif rules.add_dummy_prefix:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {"type": "Sequence", "decoders": steps}


def _replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def _merges(proto: Any) -> Iterator[list[str]]:
    """Merges of normal pieces, best score first: SentencePiece joins the two neighbours whose joint piece has
    the best score, however that splits.

    Runs of spaces share one score, and the leftmost neighbours are joined first; a list has no ties, but with
    long runs before short ones the leftmost run grows first too.
    """
    scores = {piece.piece: piece.score for piece in proto.pieces if piece.type == piece.NORMAL}
    for piece in sorted(scores, key=lambda piece: (-scores[piece], -len(piece))):
        for middle in range(1, len(piece)):
            left, right = piece[:middle], piece[middle:]
            if left in scores and right in scores:
                yield [left, right]


def _special_token(index: int, content: str) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": index, "content": content, **flags}
