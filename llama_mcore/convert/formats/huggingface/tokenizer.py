"""A SentencePiece BPE model in the format of Hugging Face's `tokenizers`.

`transformers` could read tokenizer.model itself, but its LlamaTokenizer drops the leading space of a text
that begins with one. The file written here encodes every text as SentencePiece does, and so as the training
data was encoded, with one difference: a control token that is spelled out in a text, such as `</s>`, is that
token, and what follows it is encoded as a text of its own, as documents follow each other in the training
stream. With `split_special_tokens=True` it is characters here too.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

from sentencepiece import SentencePieceProcessor
from sentencepiece import sentencepiece_model_pb2 as model_pb2

from llama_mcore.data.tokenizer import Tokenizer
from llama_mcore.errors import ConfigError, Problem, shown

TOKENIZER_MODEL = "tokenizer.model"
_SPACE = "\u2581"
_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")
_MOST_NAMED = 3
_REMEDY = "convert to meta, whose tokenizer.model is this one"


def tokenizer_files(tokenizer: Tokenizer, max_length: int) -> dict[str, bytes]:
    """tokenizer.model as it is, and what `AutoTokenizer` reads. Raises ConfigError for rules of the model
    that tokenizer.json cannot say."""
    model = tokenizer.path.read_bytes()
    config = tokenizer_config(tokenizer, max_length)
    content = {
        "tokenizer.json": tokenizer_json(model),
        "tokenizer_config.json": config,
        # it goes before tokenizer_config.json: a source's would change what is special
        "special_tokens_map.json": {name: config[name] for name in _SPECIAL},
    }
    texts = {name: json.dumps(each, indent=1, ensure_ascii=False) + "\n" for name, each in content.items()}
    return {TOKENIZER_MODEL: model} | {name: text.encode() for name, text in texts.items()}


def tokenizer_json(model: bytes) -> dict[str, Any]:
    """What `tokenizers.Tokenizer.from_file` reads. Raises ConfigError for what it cannot say."""
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
            # what is split off whole is one token, whatever its characters would merge to
            "ignore_merges": bool(defined),
            "vocab": {piece: index for index, piece in enumerate(pieces)},
            "merges": list(_merges(proto)),
        },
    }


def tokenizer_config(tokenizer: Tokenizer, max_length: int) -> dict[str, Any]:
    """What `transformers.AutoTokenizer` reads. The generic class takes tokenizer.json as it is.

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
    """The model's own, else its unknown token, which no text needs where bytes are pieces.

    EOS would not do: whoever fine-tunes leaves padding out of the loss, and the model would never learn to
    stop.
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
        "unused pieces": ", ".join(unused[:_MOST_NAMED]) or None,
    }
    reason = "cannot be said exactly in tokenizer.json"
    problems = [
        Problem(f"tokenizer: {rule}", shown(value), reason, _REMEDY)
        for rule, value in refused.items()
        if value is not None
    ]
    return problems or _not_told_apart(proto)


def _not_told_apart(proto: Any) -> list[Problem]:
    """Beside user-defined pieces a stretch of text that is a piece becomes that piece. SentencePiece must do
    so too, which it does unless scores were changed after training."""
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
        "is not what its own text is encoded to, which tokenizer.json cannot say beside user-defined pieces"
    )
    return [Problem("tokenizer: piece", shown(piece), reason, _REMEDY) for piece in amiss[:_MOST_NAMED]]


def _user_defined(proto: Any) -> list[str]:
    """The longest first: where several begin, SentencePiece takes that."""
    found = [piece.piece for piece in proto.pieces if piece.type == piece.USER_DEFINED]
    return sorted(found, key=len, reverse=True)


def _reserved(proto: Any) -> list[str]:
    """What no text is encoded to, though it may spell it: control tokens, bytes, the unknown token."""
    return [piece.piece for piece in proto.pieces if piece.type in (piece.CONTROL, piece.BYTE, piece.UNKNOWN)]


def _any_of(texts: list[str]) -> str:
    return "|".join(map(re.escape, texts))


def _pre_tokenizer(symbols: list[str], reserved: list[str]) -> dict[str, Any]:
    """Splits off what the user has defined. Added tokens of `tokenizers` would not do: they are found before
    the normalizer runs, and a text that begins with one would lose the space that SentencePiece puts first.

    A stretch that spells a reserved piece loses its first character, or it would become that piece.
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
    """SentencePiece's, in its order. Metaspace would put no space before a text that begins with one."""
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
    """SentencePiece joins the two neighbours whose joint piece scores best, whichever way it splits.

    Runs of spaces share one score, and there the leftmost neighbours come first; a list cannot tie, but with
    long runs before short ones the leftmost run grows first too. Only normal pieces take part.
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
